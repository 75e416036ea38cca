"""Buckets: few shapes, every row once an epoch, the same on all processes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_jax.data.batches import ExampleSet, held_out_batches, train_iterator
from taid_jax.data.errors import DataError
from taid_jax.data.packing import (
    EMPTY,
    BucketBatches,
    bucket_of,
    check_buckets,
    make_table,
)
from taid_jax.data.tokens import Example

BUCKETS = (4, 8, 16)
LENGTHS = [3, 4, 5, 16, 2, 8, 9, 4, 3, 7, 12, 2, 6, 15, 4]


@pytest.fixture
def examples():
    """Fifteen examples of 2 to 16 tokens; every id occurs once: 100, 101, ..."""
    starts = np.cumsum([100, *LENGTHS])
    pairs = [
        (n, Example(np.arange(start, start + length, dtype=np.int32), counted(length)))
        for n, (start, length) in enumerate(zip(starts, LENGTHS, strict=False))
    ]
    rows = [(n,) for n in range(len(LENGTHS))]
    return ExampleSet(make_table(pairs), rows, 16, 0, False, BUCKETS)


def counted(length):
    mask = np.ones(length, np.bool_)
    mask[0] = False
    return mask


def real_ids(batches):
    return np.concatenate(
        [batch["input_ids"][batch["attention_mask"] == 1] for batch in batches]
    )


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(0, 5),
)
def test_bucket_batches_hold_every_row_once_an_epoch(tokens, size, epoch):
    batches = BucketBatches(tokens, BUCKETS, size, seed=1)
    count = batches.batches_of_epoch
    assert count == -(-len(tokens) // size)
    draws = [batches[epoch * count + n] for n in range(count)]
    rows = np.concatenate([draw.rows for draw in draws])
    assert sorted(rows[rows != EMPTY]) == list(range(len(tokens)))
    for draw in draws:
        assert draw.length in BUCKETS
        assert all(tokens[row] <= draw.length for row in draw.rows if row != EMPTY)
    # At most one batch is not full, and it is of the longest bucket.
    short = [draw for draw in draws if EMPTY in draw.rows]
    assert len(short) <= 1
    assert all(draw.length == BUCKETS[-1] for draw in short)
    # A row goes no further up than the others of its bucket leave it over.
    climbing = sum(
        bucket_of(tokens[row], BUCKETS) < draw.length
        for draw in draws
        for row in draw.rows
        if row != EMPTY
    )
    assert climbing <= (size - 1) * (len(BUCKETS) - 1)


def test_train_iterator_has_no_more_shapes_than_buckets(examples):
    batches = list(itertools.islice(train_iterator(examples, 4, seed=0), 20))
    shapes = {batch["input_ids"].shape for batch in batches}
    assert shapes == {(4, length) for length in BUCKETS}
    for batch in batches:
        assert len({array.shape for array in batch.values()}) == 1
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    epochs = [real_ids(batches[n : n + 4]) for n in range(0, 20, 4)]
    for ids in epochs:
        assert sorted(ids) == list(range(100, 100 + sum(LENGTHS)))
    assert len({tuple(ids) for ids in epochs}) == 5  # Each in an order of its own.


def test_train_iterator_with_buckets_leaves_rows_of_a_large_batch_empty(examples):
    batch = next(train_iterator(examples, 32, seed=0))
    assert batch["input_ids"].shape == (32, 16)
    assert (batch["attention_mask"].max(axis=1) == 0).sum() == 32 - len(LENGTHS)


def test_held_out_batches_have_the_shortest_bucket_that_holds_them(examples):
    batches = held_out_batches(examples, 2)
    pairs = [LENGTHS[n : n + 2] for n in range(0, len(LENGTHS), 2)]
    wanted = [bucket_of(max(pair), BUCKETS) for pair in pairs]
    assert [batch["labels"].shape[1] for batch in batches] == wanted
    assert real_ids(batches).tolist() == list(range(100, 100 + sum(LENGTHS)))


@pytest.mark.parametrize("buckets", [(8, 4), (4, 4), (1, 4), (4, 32)])
def test_check_buckets_says_what_it_needs(buckets):
    with pytest.raises(DataError, match="rise from at least 2 to seq_len, which is 16"):
        check_buckets(buckets, 16)


def test_check_buckets_ends_with_the_whole_length():
    assert check_buckets((4, 8), 16) == (4, 8, 16)
    assert check_buckets((4, 16), 16) == (4, 16)
