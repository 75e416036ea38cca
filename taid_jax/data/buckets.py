"""Batches of a few fixed lengths, so that short rows do not pay for the longest."""

import bisect
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from taid_jax.data.errors import DataError

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
