"""Examples in few flat arrays, which of them share a row, and rows of like lengths."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from taid_jax.data.errors import DataError
from taid_jax.data.tokens import Example


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Many examples end to end: five bytes a token, any of them found at once.

    Attributes:
        ids: `(tokens,)` int32, all examples end to end.
        counted: `(tokens,)` bool.
        starts: `(examples + 1,)` int64; example i is `starts[i]:starts[i + 1]`.
        documents: `(examples,)` int64, the number of the document it comes from.
        prompts: `(examples,)` int64, the tokens before the last answer.
        answer_ends: `(examples,)` int64, the token after the last answer.
        teacher: The same of what the teacher sees, where that is something else.
    """

    ids: Int32[np.ndarray, " tokens"]
    counted: Bool[np.ndarray, " tokens"]
    starts: Int64[np.ndarray, " bounds"]
    documents: Int64[np.ndarray, " examples"]
    prompts: Int64[np.ndarray, " examples"]
    answer_ends: Int64[np.ndarray, " examples"]
    teacher: "TokenTable | None" = None

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Example:
        span = slice(self.starts[index], self.starts[index + 1])
        return Example(
            self.ids[span],
            self.counted[span],
            int(self.prompts[index]),
            int(self.answer_ends[index]),
            None if self.teacher is None else self.teacher[index],
        )

    @property
    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """Tokens of every example."""
        return np.diff(self.starts)

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that change when any example does."""
        digest = hashlib.blake2b(digest_size=8)
        answers = (self.prompts, self.answer_ends)
        for array in (self.ids, self.counted, self.starts, *answers):
            digest.update(array.tobytes())
        if self.teacher is not None:
            digest.update(self.teacher.digest().encode())
        return digest.hexdigest()


def make_table(examples: Iterable[tuple[int, Example]]) -> TokenTable:
    """Returns the table of (number of the document, example) pairs."""
    documents, ids, counted, prompts, ends = [], [], [], [], []
    teachers: list[tuple[int, Example]] = []
    for document, example in examples:
        documents.append(document)
        ids.append(example.ids)
        counted.append(example.counted)
        prompts.append(example.prompt)
        ends.append(example.answer_end)
        if example.teacher is not None:
            teachers.append((document, example.teacher))
    lengths = np.array([0, *map(len, ids)], np.int64)
    return TokenTable(
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        counted=np.concatenate(counted) if counted else np.zeros(0, np.bool_),
        starts=np.cumsum(lengths),
        documents=np.array(documents, np.int64),
        prompts=np.array(prompts, np.int64),
        answer_ends=np.array(ends, np.int64),
        teacher=make_table(teachers) if teachers else None,
    )


Rows = list[tuple[int, ...]]
"""The examples of every row, by their numbers."""


def pack_rows(lengths: Sequence[int], capacity: int) -> Rows:
    """Returns rows that hold every example once, whole, in few rows.

    Best-fit decreasing: the longest first, each into the fullest row that still has
    room for it. (First-fit takes the first row with room; taking the fullest needs no
    search through the rows, only through the distinct amounts of room left.) The same
    lengths always give the same rows.

    Args:
        lengths: Tokens of every example, from 1 to `capacity`.
        capacity: Tokens of a row.

    Returns:
        Rows in the order of their lowest-numbered example, examples in rising order.

    Raises:
        ValueError: If an example does not fit into a row.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> the rows that have it
    rooms: list[int] = []  # the keys of by_room, rising
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for example in longest_first:
        length = lengths[example]
        if not 1 <= length <= capacity:
            raise ValueError(
                f"need examples of 1 to {capacity} tokens, got {length} in {example}"
            )
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(example)
        if left := room - length:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(row)
    return sorted(tuple(sorted(row)) for row in rows)


EMPTY = -1
"""The number of a row that is padding throughout."""

_ENDLESS = 2**40
"""Batches of an endless source: grain asks for a length."""


class Draw(NamedTuple):
    """What a batch is made from.

    Attributes:
        rows: `(batch,)` int64, numbers of rows; `EMPTY` where there is none.
        length: Tokens of each, padding included.
    """

    rows: Int64[np.ndarray, " batch"]
    length: int


def check_buckets(buckets: Sequence[int], seq_len: int) -> tuple[int, ...]:
    """Returns the lengths of batches, rising; the last is `seq_len`.

    Raises:
        DataError: If they are not rising, or a length is not in [2, seq_len].
    """
    lengths = [*buckets, *([] if seq_len in buckets else [seq_len])]
    rising = all(a < b for a, b in itertools.pairwise(lengths))
    if not rising or lengths[0] < 2:
        raise DataError(
            f"need buckets that rise from at least 2 to seq_len, which is {seq_len}; "
            f"got {', '.join(map(str, buckets))}"
        )
    return tuple(lengths)


def bucket_of(length: int, lengths: Sequence[int]) -> int:
    """Returns the shortest of the rising lengths that holds so many tokens."""
    return lengths[bisect.bisect_left(lengths, length)]


class BucketBatches:
    """The batches of all epochs, each found by its number alone.

    Every epoch has a new order, drawn from the seed, and holds every row once. A batch
    has rows of one bucket; those that are left when its bucket's last batch is full go
    into the next longer one, so that a single batch of an epoch, of the longest bucket,
    may end with empty rows. The lengths come in a random order.

    Args:
        tokens: Of every row.
        lengths: Of batches, rising, the last at least the longest row.
        batch_size: Rows of a batch.
        seed: Of the order.
    """

    def __init__(
        self,
        tokens: Sequence[int] | Int64[np.ndarray, " rows"],
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
    ):
        places = np.searchsorted(np.asarray(lengths), np.asarray(tokens))
        self._rows = [np.flatnonzero(places == place) for place in range(len(lengths))]
        self._lengths = tuple(lengths)
        self._size = batch_size
        self._seed = seed
        self.batches_of_epoch = -(-len(tokens) // batch_size)
        # Two: what is made ahead may be in the next epoch.
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Draw:
        epoch, place = divmod(int(index), self.batches_of_epoch)
        rows, lengths = self._epoch(epoch)
        return Draw(rows[place], int(lengths[place]))

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows and the length of every batch of an epoch."""
        draw = np.random.default_rng([self._seed, epoch])
        left = np.zeros(0, np.int64)
        batches, lengths = [], []
        for length, rows in zip(self._lengths, self._rows, strict=True):
            rows = np.concatenate([left, draw.permutation(rows)])
            if length == self._lengths[-1]:
                empty = -len(rows) % self._size
                rows = np.pad(rows, (0, empty), constant_values=EMPTY)
            whole = len(rows) // self._size * self._size
            batches.append(rows[:whole].reshape(-1, self._size))
            lengths.append(np.full(len(batches[-1]), length))
            left = rows[whole:]
        order = draw.permutation(self.batches_of_epoch)
        return np.concatenate(batches)[order], np.concatenate(lengths)[order]
