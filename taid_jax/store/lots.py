"""Which rows go through a teacher together, and whose records each file has."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from taid_jax.data.batches import ExampleSet
from taid_jax.data.packing import EMPTY
from taid_jax.errors import InputError, parsing
from taid_jax.store.folder import DONE
from taid_jax.store.format import Column, File, example_key
from taid_jax.store.options import StoreOptions


class Lot(NamedTuple):
    """Rows that go through the teacher together."""

    side: ExampleSet
    rows: Int64[np.ndarray, " rows"]
    length: int


class Shard(NamedTuple):
    """A file and the lots whose records it has."""

    number: int
    lots: Sequence[Lot]


def plan_shards(
    lots: Sequence[Lot], columns: Sequence[Column], options: StoreOptions
) -> list[Shard]:
    """Returns this job's share of the files, numbered over all jobs."""
    width = sum(column.bytes_per_token for column in columns)
    most = max((len(lot.rows) * lot.length for lot in lots), default=1)
    each = max(1, (options.shard_mib << 20) // (most * width))
    part, parts = options.place
    starts = range(0, len(lots), each)
    return [
        Shard(number, lots[start : start + each])
        for number, start in enumerate(starts)
        if number % parts == part - 1
    ]


def make_lots(side: ExampleSet, size: int) -> Iterator[Lot]:
    """Yields all rows of a side, `size` at a time, those of a bucket together."""
    rows = np.arange(len(side))
    lengths, place = (side.seq_len,), np.zeros(len(side), np.int64)
    if side.buckets:
        lengths = side.buckets
        place = np.searchsorted(lengths, np.asarray(side.tokens_of_rows()))
    for number, length in enumerate(lengths):
        chosen = rows[place == number]
        chosen = np.pad(chosen, (0, -len(chosen) % size), constant_values=EMPTY)
        for lot in chosen.reshape(-1, size):
            yield Lot(side, lot, int(length))


class JobFiles(NamedTuple):
    """The files of a job, and whose records each has.

    Attributes:
        folder: Of the store.
        shards: Of this job.
        parts: Processes that share each lot.
        owned: The examples that are stored, by their number in the table. Of equal
            ones at equal places of their rows it is the first.
    """

    folder: pathlib.Path
    shards: Sequence[Shard]
    parts: int
    owned: frozenset[int]

    def path(self, shard: Shard, part: int) -> pathlib.Path:
        """Returns the file of a process."""
        which = f"-{part:03}" if self.parts > 1 else ""
        return self.folder / f"outputs-{shard.number:05}{which}.arrayrecord"

    def done(self, path: pathlib.Path) -> File | None:
        """Returns what is known of a file that is whole; None of any other."""
        note = path.with_name(path.name + DONE)
        if not (path.is_file() and note.is_file()):
            return None
        with contextlib.suppress(InputError), parsing(str(note)):
            found = File(**json.loads(note.read_bytes())["file"])
            return found if found.bytes == path.stat().st_size else None
        return None

    def rows(self, lot: Lot, part: int) -> Int64[np.ndarray, " rows"]:
        """Returns the rows of a process."""
        each = len(lot.rows) // self.parts
        return lot.rows[part * each : (part + 1) * each]

    def examples(self, lot: Lot, part: int) -> Iterator[tuple[int, int, int]]:
        """Yields row, first token and number of each example that is stored."""
        for row, index in enumerate(self.rows(lot, part).tolist()):
            for start, number in lot.side.placed(index):
                if number in self.owned:
                    yield row, start, number


def find_owned(lots: Sequence[Lot]) -> frozenset[int]:
    """Returns the examples that are stored, by their numbers in the table."""
    first: dict[tuple[bytes, int], int] = {}
    for lot in lots:
        for index in lot.rows.tolist():
            for start, number in lot.side.placed(index):
                key = example_key(lot.side.table[number].ids)
                first.setdefault((key, start), number)
    return frozenset(first.values())
