"""The table of examples."""

import dataclasses

import numpy as np

from taid_jax.data.tokens import Example, make_table


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
