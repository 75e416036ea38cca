"""A store that is read: an example's outputs by its token ids."""

import functools
import pathlib
from collections.abc import Mapping

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int, Int64, Shaped, UInt32, UInt64
from safetensors.numpy import load_file

from taid_jax.errors import InputError, explain, parsing
from taid_jax.store.format import (
    DTYPES,
    HEAD,
    INDEX,
    KEY_BYTES,
    Manifest,
    StoreError,
    example_key,
    fault_of,
    read_manifest,
    unpack_record,
)

_RANDOM = "readahead_buffer_size:0,max_parallelism:0"
_OPEN_SHARDS = 256
_COPY = "Copy it again, or remove it and start the job that stored it again"


class Store:
    """A teacher's stored outputs.

    Args:
        folder: What `taid-jax store` has made.

    Attributes:
        folder: Absolute.
        manifest: What it is.
        keys: `(examples, 2)` uint64 of the index, a key each.
        places: `(examples, 2)` uint32, shard and record of each.
        starts: `(examples,)` uint32, its place in its row.

    Raises:
        StoreError: If it is no store, or a file of it is missing, of another size, or
            another one's.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder).expanduser().absolute()
        self.manifest: Manifest = read_manifest(self.folder)
        about = self.manifest
        for file in (*about.shards, *about.others):
            contents = file in about.others  # Those of shards take long.
            if fault := fault_of(self.folder, file, contents=contents):
                raise StoreError(f"{fault}. {_COPY}")
        with parsing(f"{self.folder / INDEX} cannot be read", StoreError):
            index = load_file(self.folder / INDEX)
            self.keys: UInt64[np.ndarray, "examples 2"] = index["keys"]
            self.places: UInt32[np.ndarray, "examples 2"] = index["places"]
            self.starts: UInt32[np.ndarray, " examples"] = index["starts"]
            sizes = np.array([shard.records for shard in self.manifest.shards])
            shards, records = self.places.T
            if not len(self.keys) == len(self.places) == len(self.starts) or (
                len(shards) and not (records < sizes[shards]).all()
            ):
                raise StoreError("it names records beyond the shards")
        self._check_shards()
        self._reader = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return len(self.keys)

    def _check_shards(self) -> None:
        """Raises if a shard is another's: its first record has another key."""
        shards, records = self.places.T
        for place in np.flatnonzero(records == 0).tolist():
            shard, key = int(shards[place]), self.keys[place].astype(">u8").tobytes()
            found = self._record(self._open(shard), shard, 0)
            if found[:KEY_BYTES] != key:
                path = self.folder / self.manifest.shards[shard].name
                raise StoreError(f"{path} is not the shard of that name. {_COPY}")

    def identity(self) -> str:
        """Returns what identifies the outputs, whatever files they lie in."""
        about = self.manifest
        columns = ", ".join(f"{c.name} {c.dtype} {c.width}" for c in about.columns)
        return f"{about.kind} of {about.teacher} ({columns})"

    def has(self, ids: Int[np.ndarray, " tokens"]) -> bool:
        """Returns whether an example is stored."""
        return self._find(example_key(ids), 0) is not None

    def blank(self, shape: tuple[int, int]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Returns the columns of a batch without tokens, `(*shape, width)` each."""
        return {
            column.name: np.full(
                (*shape, column.width), column.filler, DTYPES[column.dtype]
            )
            for column in self.manifest.columns
        }

    def read(
        self, ids: Int[np.ndarray, " tokens"], start: int = 0
    ) -> Mapping[str, Shaped[np.ndarray, "tokens _"]]:
        """Returns the columns of an example, `(tokens, width)` each.

        Args:
            ids: Its tokens.
            start: Their place in a row. An example that comes at several was stored at
                each, as the last bits of an output depend on it; any will do otherwise.

        Raises:
            StoreError: If it is not in the store, or its record is damaged.
        """
        number = self._find(example_key(ids), start)
        if number is None:
            raise StoreError(f"{self.folder} lacks an example of {len(ids)} tokens")
        columns = self.columns(number)
        (tokens,) = {len(column) for column in columns.values()}
        if tokens != len(ids):
            shard, record = self.places[number].tolist()
            fault = StoreError(f"it has {tokens} tokens, the example {len(ids)}")
            raise self._damaged(shard, record, fault)
        return columns

    def in_order(self) -> Int64[np.ndarray, " examples"]:
        """Returns the numbers in the index of all examples as the files have them."""
        return np.lexsort((self.places[:, 1], self.places[:, 0]))

    def columns(self, number: int) -> Mapping[str, Shaped[np.ndarray, "tokens _"]]:
        """Returns the columns of an example by its number in the index.

        Raises:
            StoreError: If its record is damaged.
        """
        shard, record = self.places[number].tolist()
        found = self._record(self._reader(shard), shard, record)
        key = self.keys[number].astype(">u8").tobytes()
        try:
            return unpack_record(found, key, self.manifest.columns)
        except StoreError as error:
            raise self._damaged(shard, record, error) from error

    def _open(self, shard: int) -> ArrayRecordReader:
        path = self.folder / self.manifest.shards[shard].name
        with parsing(f"{path} cannot be read ({_COPY})", StoreError):
            return ArrayRecordReader(str(path), _RANDOM)

    def _record(self, reader: ArrayRecordReader, shard: int, record: int) -> bytes:
        try:
            (found,) = reader.read([record])
        except Exception as error:  # Of C++, whatever it is.
            raise self._damaged(shard, record, error) from error
        return found

    def _damaged(self, shard: int, record: int, error: Exception) -> InputError:
        path = self.folder / self.manifest.shards[shard].name
        return StoreError(
            f"{path}: record {record} is damaged ({explain(error)}); the other shards "
            f"are as they were. {_COPY}"
        )

    def _find(self, key: bytes, start: int) -> int | None:
        """Returns the number of an example in the index, None where there is none."""
        high, low = np.frombuffer(key, ">u8").tolist()
        number = int(np.searchsorted(self.keys[:, 0], np.uint64(high)))
        found = None
        while number < len(self) and self.keys[number, 0] == high:
            if self.keys[number, 1] == low:
                if self.starts[number] == start:
                    return number
                found = number if found is None else found
            number += 1
        return found

    def head(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the head of a store of hidden states, by dotted names.

        Raises:
            StoreError: If they cannot be read.
        """
        with parsing(f"{self.folder / HEAD} cannot be read", StoreError):
            return load_file(self.folder / HEAD)
