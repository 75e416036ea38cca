"""What a folder of a teacher's stored outputs holds, and how it is found in there.

    manifest.json              what it is, of which teacher, and what files there are
    index.safetensors          the key of every example, and where its record lies
    outputs-00000.arrayrecord  a record an example: its key, then its columns
    head.safetensors           the teacher's last layer, of a store of hidden states
    teacher/                   its config, generation settings and tokenizer

A record is found by what it was made from: the hash of the example's token ids. A
causal model's outputs do not depend on what an example is packed with, so a store
survives another order, seed, packing, batch size and mesh.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, Shaped, UInt16

from taid_jax.errors import InputError, explain, parsing, show
from taid_jax.files import write_whole

VERSION = 1
MANIFEST, INDEX, HEAD = "manifest.json", "index.safetensors", "head.safetensors"
TEACHER = "teacher"
KEY_BYTES = 16

LOGPROB_STEP = 1 / 2048
"""Stored log-probabilities are multiples of it, from 0 to -32 nats, in 16 bits."""

DTYPES: Mapping[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
}

Kind = Literal["hidden", "topk", "sampled"]
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("teacher_hidden",),
    "topk": ("teacher_ids", "teacher_logprobs", "teacher_tail"),
    "sampled": ("teacher_ids", "teacher_counts"),
}


class StoreError(InputError):
    """A teacher's stored outputs cannot be used."""


@dataclasses.dataclass(frozen=True)
class Column:
    """Numbers that every token of an example has, by the name that batches use.

    Attributes:
        name: As in a batch.
        dtype: As stored.
        width: How many a token has.
    """

    name: str
    dtype: str
    width: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token."""
        return DTYPES[self.dtype].itemsize * self.width

    @property
    def filler(self) -> int:
        """What a batch has where there is no token: an id of nothing, or 0."""
        unknown = self.name == "teacher_ids"
        most = min(np.iinfo(DTYPES[self.dtype]).max, 2**31 - 1) if unknown else 0
        return int(most)


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a store, by its path in it.

    Attributes:
        name: With the folders in between.
        bytes: Its size.
        sha256: Of its contents.
        records: 0 of a file that is no shard.
    """

    name: str
    bytes: int
    sha256: str
    records: int = 0


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store is.

    Attributes:
        kind: "hidden": hidden states after the final norm, and the head; "topk": the
            most probable ids and their log-probabilities; "sampled": ids that were
            drawn, and how often.
        columns: What a record holds, in order.
        vocab_size: Entries of the teacher's softmax.
        teacher: Fingerprint of the teacher's weights and config.
        tokenizer: Fingerprint of the tokenizer.
        source: What the teacher was called, for messages.
        examples: How many there are.
        tokens: In all of them.
        shards: The files with records.
        others: All other files, those of the teacher among them.
        made: What else decided what is stored: data, `seq_len`, part of the job.
        mass: Mean probability of the stored ids, of "topk".
        draws: Draws of a token, of "sampled".
    """

    kind: Kind
    columns: tuple[Column, ...]
    vocab_size: int
    teacher: str
    tokenizer: str
    source: str
    examples: int
    tokens: int
    shards: tuple[File, ...]
    others: tuple[File, ...]
    made: Mapping[str, Any]
    mass: float | None = None
    draws: int | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token in a record."""
        return sum(column.bytes_per_token for column in self.columns)


def hidden_columns(d_model: int, dtype: str) -> tuple[Column, ...]:
    """Returns the columns of a store of hidden states."""
    return (Column("teacher_hidden", dtype, d_model),)


def topk_columns(k: int, vocab_size: int) -> tuple[Column, ...]:
    """Returns the columns of a store of the `k` most probable ids."""
    ids, logprobs, tail = COLUMNS["topk"]
    return (
        Column(ids, _ids_dtype(vocab_size), k),
        Column(logprobs, "uint16", k),
        Column(tail, "uint16", 1),
    )


def sampled_columns(draws: int, vocab_size: int) -> tuple[Column, ...]:
    """Returns the columns of a store of so many draws of each token."""
    ids, counts = COLUMNS["sampled"]
    return (
        Column(ids, _ids_dtype(vocab_size), draws),
        Column(counts, "uint16", draws),
    )


def _ids_dtype(vocab_size: int) -> str:
    """Returns what holds all ids, and one more that stands for none."""
    return "uint16" if vocab_size < 2**16 else "uint32"


def example_key(ids: Int[np.ndarray, " tokens"]) -> bytes:
    """Returns the key of an example: a hash of its token ids, 16 bytes."""
    text = np.ascontiguousarray(ids, "<i4").tobytes()
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()


def encode_logprobs(
    logprobs: Float[np.ndarray, "*shape"],
) -> UInt16[np.ndarray, "*shape"]:
    """Returns log-probabilities in fixed point; those below -32 nats are the least."""
    steps = np.rint(-np.asarray(logprobs, np.float64) / LOGPROB_STEP)
    return np.clip(steps, 0, 2**16 - 1).astype(np.uint16)


def stored_mass(
    tail: UInt16[np.ndarray, "*shape"],
) -> Float[np.ndarray, "*shape"]:
    """Returns the probability of the stored ids, from that of all others."""
    return -np.expm1(tail.astype(np.float64) * -LOGPROB_STEP)


def pack_record(key: bytes, columns: Sequence[Shaped[np.ndarray, "tokens _"]]) -> bytes:
    """Returns the record of an example.

    Columns are those of the manifest, in its order and in their stored dtypes.
    """
    return key + b"".join(np.ascontiguousarray(column).tobytes() for column in columns)


def unpack_record(
    record: bytes, key: bytes, columns: Sequence[Column]
) -> dict[str, np.ndarray]:
    """Returns the columns of a record, `(tokens, width)` each.

    Raises:
        StoreError: If the record is another example's, or ends within a token.
    """
    width = sum(column.bytes_per_token for column in columns)
    tokens, rest = divmod(len(record) - KEY_BYTES, width)
    if record[:KEY_BYTES] != key or rest:
        raise StoreError("it is not the one that the index names")
    found, start = {}, KEY_BYTES
    for column in columns:
        dtype = DTYPES[column.dtype]
        values = np.frombuffer(record, dtype, tokens * column.width, start)
        found[column.name] = values.reshape(tokens, column.width)
        start += tokens * column.bytes_per_token
    return found


def describe_file(
    path: pathlib.Path, records: int = 0, name: str | None = None
) -> File:
    """Returns size and checksum of a file, which a store has by its name or `name`."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return File(name or path.name, path.stat().st_size, digest.hexdigest(), records)


def fault_of(folder: pathlib.Path, file: File, *, contents: bool) -> str | None:
    """Returns what is wrong with a file of a store: its size, or contents if asked."""
    path = folder / file.name
    try:
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            return f"{path} is missing; {MANIFEST} says {file.bytes:,} bytes"
        if size != file.bytes:
            return f"{path} has {size:,} bytes; {MANIFEST} says {file.bytes:,} bytes"
        if contents and describe_file(path).sha256 != file.sha256:
            return f"{path} has other contents than {MANIFEST} says"
    except OSError as error:
        return f"{path} cannot be read: {explain(error)}"
    return None


def write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    """Writes a manifest: all else has to be there."""
    values = dataclasses.asdict(manifest)
    values = {"version": VERSION, **values, "digest": _digest(values)}
    write_whole(folder / MANIFEST, (json.dumps(values, indent=1) + "\n").encode())


def _digest(values: Mapping[str, Any]) -> str:
    """Returns what tells whether a manifest is as it was written."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Returns the manifest of a store.

    Raises:
        StoreError: If the folder is no store, of another format, or was changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(
            f"{folder} holds no stored teacher: there is no {MANIFEST}. Make one with "
            "`taid-jax store`; a job that was stopped goes on when it is started again"
        )
    with parsing(f"{path} cannot be read", StoreError):
        values = json.loads(path.read_bytes())
        version, digest = values.pop("version"), values.pop("digest")
        if version != VERSION:
            raise StoreError(
                f"{path}: need format {VERSION}, got {show(version)}; store the "
                "teacher again with this release"
            )
        if digest != _digest(values):
            raise StoreError(
                f"{path} was changed after it was written; copy the store again"
            )
        lists = {
            "columns": tuple(Column(**each) for each in values.pop("columns")),
            "shards": tuple(File(**each) for each in values.pop("shards")),
            "others": tuple(File(**each) for each in values.pop("others")),
        }
        manifest = Manifest(**lists, **values)
        _check(path, manifest)
    return manifest


def _check(path: pathlib.Path, manifest: Manifest) -> None:
    """Refuses a manifest that names what cannot be, whoever wrote it."""
    for column in manifest.columns:
        if column.dtype not in DTYPES or not 1 <= column.width < 2**31:
            raise StoreError(f"{path}: {show(column)} is no column")
    for file in (*manifest.shards, *manifest.others):
        name = pathlib.PurePosixPath(file.name)
        if name.is_absolute() or ".." in name.parts or not 0 <= file.bytes < 2**63:
            raise StoreError(f"{path}: {show(file.name)} is no file of a store")
    names = tuple(column.name for column in manifest.columns)
    if names != COLUMNS.get(manifest.kind) or not 1 <= manifest.vocab_size < 2**31:
        raise StoreError(f"{path}: kind {show(manifest.kind)} with columns {names}")
