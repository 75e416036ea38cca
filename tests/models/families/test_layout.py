"""Layouts: reading part by part gives what reading the whole and cutting gives."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_jax.models.families.layout import Part, parse_layout

SIZES = {"v": 7, "d": 6, "n": 4, "k": 2, "h": 6, "f": 5, "c": 2, "r": 3}
LAYOUTS = [
    "v d -> v d",
    "v d -> d v",
    "d -> d",
    "f d -> d f",
    "(n h) d -> d n h",
    "d (n h) -> n h d",
    "(n r c) d -> d n (c r)",
    "(n r c) -> n (c r)",
]


def cuts(draw, size):
    start = draw(st.integers(0, size - 1))
    return slice(start, draw(st.integers(start + 1, size)))


def param_shape(layout):
    return tuple(math.prod(SIZES[x] for x in axis) for axis in layout.param)


def whole(shape):
    return tuple(slice(0, size) for size in shape)


def test_read_splits_heads_and_turns_the_matrix():
    layout = parse_layout("(n h) d -> d n h")
    stored = np.arange(4 * 6 * 6).reshape(24, 6)
    param = layout.read(lambda index: stored[index], whole((6, 4, 6)), SIZES)
    assert param.shape == param_shape(layout) == (6, 4, 6)
    assert param[5, 2, 3] == stored[2 * 6 + 3, 5]


@pytest.mark.parametrize("text", LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_read_of_a_part_equals_that_part_of_the_whole(text, data):
    layout = parse_layout(text)
    shape = layout.stored_shape(SIZES)
    stored = np.arange(np.prod(shape)).reshape(shape)
    shape_of_param = param_shape(layout)
    full = layout.read(lambda index: stored[index], whole(shape_of_param), SIZES)
    index = tuple(cuts(data.draw, size) for size in shape_of_param)
    part = layout.read(lambda index: stored[index], index, SIZES)
    np.testing.assert_array_equal(part, full[index])


def test_read_fetches_only_the_rows_of_the_heads_asked_for():
    layout = parse_layout("(n h) d -> d n h")
    stored, asked = np.zeros((24, 6)), []

    def fetch(index):
        asked.append(index)
        return stored[index]

    layout.read(fetch, (slice(2, 4), slice(1, 3), slice(0, 6)), SIZES)
    assert asked == [(slice(6, 18), slice(2, 4))]


PARTS = {
    "rows": (
        "(n h) d -> d n h",
        ("(k h) d -> d k h", "(k h) d -> d k h"),
        {"sizes": ("n h", "k h", "k h")},
    ),
    "columns": ("d f -> d f", ("d f -> d f",), {"sizes": ("f", "f"), "axis": 1}),
    "groups": (
        "(n h) d -> d n h",
        ("(n h) d -> d n h", "(n h) d -> d n h"),
        {"sizes": ("h", "h", "h"), "groups": "n"},
    ),
    "biases": ("(n h) -> n h", ("(n h) -> n h",), {"sizes": ("h", "h"), "groups": "n"}),
}


def parts(name):
    first, others, options = PARTS[name]
    layouts = [parse_layout(text) for text in (first, *others)]
    return layouts, [Part(index, **options) for index in range(len(layouts))]


def stored_whole(name):
    layouts, pieces = parts(name)
    shape = pieces[0].whole_shape(layouts[0].stored_shape(SIZES), SIZES)
    return np.arange(np.prod(shape)).reshape(shape)


def read_piece(stored, layout, part, index):
    fetch = part.fetch_from(lambda index: stored[index], SIZES)
    return layout.read(fetch, index, SIZES)


@pytest.mark.parametrize("name", PARTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_part_of_a_piece_equals_that_part_of_the_whole_piece(name, data):
    layouts, pieces = parts(name)
    stored = stored_whole(name)
    which = data.draw(st.integers(0, len(pieces) - 1))
    layout, part = layouts[which], pieces[which]
    shape = param_shape(layout)
    full = read_piece(stored, layout, part, whole(shape))
    index = tuple(cuts(data.draw, size) for size in shape)
    read = read_piece(stored, layout, part, index)
    np.testing.assert_array_equal(read, full[index])


def test_part_fetches_only_its_own_rows():
    part, asked = Part(1, ("n h", "k h", "k h")), []

    def watch(index):
        asked.append(index)
        return np.zeros((6, 3))

    fetch = part.fetch_from(watch, SIZES)
    fetch((slice(6, 12), slice(0, 3)))
    assert asked == [(slice(24 + 6, 24 + 12), slice(0, 3))]


@pytest.mark.parametrize("text", ["v d", "v d -> d", "v d -> d v v", "v v -> v v"])
def test_parse_layout_refuses_axes_that_do_not_match(text):
    with pytest.raises(ValueError, match="same axes on both sides"):
        parse_layout(text)
