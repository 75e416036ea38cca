"""Packing: every example once, no row too full, few rows."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taid_jax.data.packing import make_table, pack_rows
from taid_jax.data.tokens import Example


@given(st.lists(st.integers(1, 16)))
def test_pack_rows_holds_every_example_once(lengths):
    rows = pack_rows(lengths, 16)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(1 <= sum(lengths[i] for i in row) <= 16 for row in rows)
    assert rows == sorted(rows)
    # Two rows that are half empty would have been one.
    assert sum(sum(lengths[i] for i in row) <= 8 for row in rows) <= 1


def test_pack_rows_takes_the_fullest_row_with_room():
    assert pack_rows([4, 7, 6, 3], 10) == [(0, 2), (1, 3)]
    assert pack_rows([10, 10], 10) == [(0,), (1,)]
    assert pack_rows([], 10) == []


def test_pack_rows_fills_97_percent_on_chat_lengths():
    # UltraChat: conversations of about 1,100 tokens on average, at most 2,048.
    draws = np.random.default_rng(0).lognormal(np.log(1000), 0.45, 20_000)
    lengths = draws[draws <= 2048].astype(int).tolist()
    rows = pack_rows(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) >= 0.97


def test_pack_rows_needs_examples_that_fit():
    with pytest.raises(ValueError, match="1 to 8 tokens, got 9 in 1"):
        pack_rows([3, 9], 8)


def example(*ids):
    counted = np.arange(len(ids)) > 0
    return Example(np.array(ids, np.int32), counted)


def test_make_table_gives_examples_back():
    table = make_table([(0, example(5, 6, 7)), (0, example(8)), (4, example(9, 1))])
    assert len(table) == 3
    assert table.lengths.tolist() == [3, 1, 2]
    assert table.documents.tolist() == [0, 0, 4]
    assert table[2].ids.tolist() == [9, 1]
    assert table[2].counted.tolist() == [False, True]


def test_make_table_may_be_empty():
    table = make_table([])
    assert len(table) == 0
    assert table.lengths.tolist() == []


def test_digest_sees_ids_borders_and_counts():
    table = make_table([(0, example(5, 6, 7)), (1, example(8, 9))])
    others = [
        make_table([(0, example(5, 6, 7)), (1, example(8, 1))]),
        make_table([(0, example(5, 6)), (1, example(7, 8, 9))]),
        dataclasses.replace(table, counted=~table.counted),
    ]
    digests = {other.digest() for other in [table, *others]}
    assert len(digests) == 4
    assert table.digest() == dataclasses.replace(table).digest()
