"""Layouts: reading part by part gives what reading the whole and cutting gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_jax.models.layout import parse_layout

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


def whole(shape):
    return tuple(slice(0, size) for size in shape)


def test_read_splits_heads_and_turns_the_matrix():
    layout = parse_layout("(n h) d -> d n h")
    stored = np.arange(4 * 6 * 6).reshape(24, 6)
    param = layout.read(lambda index: stored[index], whole((6, 4, 6)), SIZES)
    assert param.shape == layout.param_shape(SIZES) == (6, 4, 6)
    assert param[5, 2, 3] == stored[2 * 6 + 3, 5]


def test_read_undoes_the_order_of_llama_cpp():
    # One head of width 6: llama.cpp has a0 b0 a1 b1 a2 b2, Hugging Face a0 a1 a2 b0 b1
    # b2, where (a, b) are the halves of a rotary pair.
    layout = parse_layout("(n r c) -> n (c r)")
    stored = np.array(["a0", "b0", "a1", "b1", "a2", "b2"])
    param = layout.read(lambda index: stored[index], whole((1, 6)), {**SIZES, "n": 1})
    assert param[0].tolist() == ["a0", "a1", "a2", "b0", "b1", "b2"]


@pytest.mark.parametrize("text", LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_read_of_a_part_equals_that_part_of_the_whole(text, data):
    layout = parse_layout(text)
    shape = layout.stored_shape(SIZES)
    stored = np.arange(np.prod(shape)).reshape(shape)
    param_shape = layout.param_shape(SIZES)
    full = layout.read(lambda index: stored[index], whole(param_shape), SIZES)
    index = tuple(cuts(data.draw, size) for size in param_shape)
    part = layout.read(lambda index: stored[index], index, SIZES)
    np.testing.assert_array_equal(part, full[index])


@pytest.mark.parametrize("text", LAYOUTS)
def test_to_stored_is_the_inverse_of_read(text):
    layout = parse_layout(text)
    shape = layout.stored_shape(SIZES)
    stored = np.arange(np.prod(shape)).reshape(shape)
    param_shape = layout.param_shape(SIZES)
    param = layout.read(lambda index: stored[index], whole(param_shape), SIZES)
    np.testing.assert_array_equal(layout.to_stored(param, SIZES), stored)


def test_read_fetches_only_the_rows_of_the_heads_asked_for():
    layout = parse_layout("(n h) d -> d n h")
    stored, asked = np.zeros((24, 6)), []

    def fetch(index):
        asked.append(index)
        return stored[index]

    layout.read(fetch, (slice(2, 4), slice(1, 3), slice(0, 6)), SIZES)
    assert asked == [(slice(6, 18), slice(2, 4))]


@pytest.mark.parametrize(
    ("kernel", "bias"),
    [
        ("(n h) d -> d n h", "(n h) -> n h"),
        ("(k r c) d -> d k (c r)", "(k r c) -> k (c r)"),
        ("d (n h) -> n h d", "d -> d"),
        ("f d -> d f", "f -> f"),
    ],
)
def test_of_bias_keeps_the_outputs(kernel, bias):
    assert parse_layout(kernel).of_bias() == parse_layout(bias)


@pytest.mark.parametrize("text", ["v d", "v d -> d", "v d -> d v v", "v v -> v v"])
def test_parse_layout_refuses_axes_that_do_not_match(text):
    with pytest.raises(ValueError, match="same axes on both sides"):
        parse_layout(text)
