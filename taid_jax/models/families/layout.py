"""How a tensor of a checkpoint becomes a parameter: a small language of named axes.

`"(n h) d -> d n h"` says that the checkpoint stores a matrix whose rows are heads times
head width and whose columns are the model's width, and that the parameter has these
three axes in the order on the right. Brackets hold axes that are one axis together, the
slowest first. Both directions follow from the one text, and so does which part of the
stored tensor a device needs for its part of the parameter.

Some checkpoints store the parameters of several modules in one tensor, side by side;
`Part` says which of them is meant.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

FileFormat = Literal["hf", "gguf"]
"""Whose names and layouts: Hugging Face's safetensors, or llama.cpp's GGUF."""

Sizes = Mapping[str, int]
"""The size of each axis letter."""

Index = tuple[slice, ...]
"""A slice with start and stop for each axis."""

Fetch = Callable[[Index], np.ndarray]
"""Returns a part of a stored tensor."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of a stored tensor and of its parameter, as groups of letters.

    Attributes:
        stored: Axes of the checkpoint's tensor.
        param: Axes of the parameter of one layer.
    """

    stored: tuple[tuple[str, ...], ...]
    param: tuple[tuple[str, ...], ...]

    def stored_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Returns the shape that the checkpoint's tensor has to have."""
        return _shape(self.stored, sizes)

    def of_bias(self) -> "Layout":
        """Returns the layout of the bias of a linear map stored with this one.

        A parameter's kernel has its outputs last. Checkpoints store them as the first
        axis of a matrix, or as the last (GPT-2), and the bias along this axis.
        """
        last = self.param[-1][-1]
        stored = next(axis for axis in self.stored if last in axis)
        param = (tuple(x for x in axis if x in stored) for axis in self.param)
        return Layout((stored,), tuple(axis for axis in param if axis))

    def to_stored(self, param: np.ndarray, sizes: Sizes) -> np.ndarray:
        """Returns a parameter of one layer as the checkpoint stores it."""
        letters = _flat(self.param)
        order = [letters.index(letter) for letter in _flat(self.stored)]
        split = param.reshape([sizes[letter] for letter in letters])
        return split.transpose(order).reshape(self.stored_shape(sizes))

    def read(self, fetch: Fetch, index: Index, sizes: Sizes) -> np.ndarray:
        """Returns a part of a parameter from no more of the checkpoint than it needs.

        Args:
            fetch: Returns a part of the stored tensor.
            index: The part of the parameter.
            sizes: Of all axes.

        Returns:
            That part, in the dtype of what was fetched.
        """
        wanted = {
            axis[0]: cut
            for axis, cut in zip(self.param, index, strict=True)
            if len(axis) == 1
        }
        there: list[slice] = []
        split: list[int] = []
        # Of axes that are stored as one, a part of the first is a range of the whole;
        # parts of the others are cut out in memory.
        for first, *rest in self.stored:
            whole = slice(0, sizes[first])
            cut = wanted.get(first, whole)
            inner = math.prod(sizes[letter] for letter in rest)
            there.append(slice(cut.start * inner, cut.stop * inner))
            split += [cut.stop - cut.start, *(sizes[letter] for letter in rest)]
        letters = _flat(self.stored)
        order = [letters.index(letter) for letter in _flat(self.param)]
        block = fetch(tuple(there)).reshape(split).transpose(order)
        length = dict(zip(letters, split, strict=True))
        block = block.reshape(_shape(self.param, length))
        firsts = [(axis[0],) for axis in self.stored]
        rest = tuple(
            slice(None) if axis in firsts else cut
            for axis, cut in zip(self.param, index, strict=True)
        )
        return block[rest]


@dataclasses.dataclass(frozen=True)
class Part:
    """One of several pieces that a checkpoint stores side by side in one tensor.

    `Part(1, ("n h", "k h", "k h"))` is the second of three blocks of rows: first as
    many as query heads times head width, then twice key heads times head width.
    With `groups="n"` the rows are cut in `n` equal groups first, and each of them holds
    a block of every piece: `Part(1, ("h", "h", "h"), groups="n")` is, of each head, the
    second third.

    Attributes:
        index: Which of the pieces, from 0.
        sizes: The length of each piece (of a group), as a product of axis letters.
        axis: The stored axis along which they lie.
        groups: The letter that counts the groups; None when there is one.
    """

    index: int
    sizes: tuple[str, ...]
    axis: int = 0
    groups: str | None = None

    def of_bias(self) -> "Part":
        """Returns the same piece of the bias, which has but one axis."""
        return dataclasses.replace(self, axis=0)

    def whole_shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        """Returns the shape of the stored tensor, given that of the piece."""
        lengths, groups = self._lengths(sizes)
        before, after = shape[: self.axis], shape[self.axis + 1 :]
        return (*before, groups * sum(lengths), *after)

    def fetch_from(self, fetch: Fetch, sizes: Sizes) -> Fetch:
        """Returns what fetches parts of the piece from the stored tensor."""
        places = self._places(sizes)

        def fetch_piece(index: Index) -> np.ndarray:
            there = places[index[self.axis]]
            first, last = int(there[0]), int(there[-1]) + 1
            before, after = index[: self.axis], index[self.axis + 1 :]
            block = fetch((*before, slice(first, last), *after))
            if len(there) == last - first:
                return block
            return block.take(there - first, self.axis)

        return fetch_piece

    def join(self, pieces: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        """Returns the stored tensor that is made of all pieces, in their order."""
        parts = [dataclasses.replace(self, index=n) for n in range(len(self.sizes))]
        places = np.concatenate([part._places(sizes) for part in parts])
        return np.concatenate(pieces, self.axis).take(np.argsort(places), self.axis)

    def _places(self, sizes: Sizes) -> np.ndarray:
        """Returns where each row of the piece lies in the stored tensor, ascending."""
        lengths, groups = self._lengths(sizes)
        start = sum(lengths[: self.index])
        whole = np.arange(groups * sum(lengths)).reshape(groups, -1)
        return whole[:, start : start + lengths[self.index]].reshape(-1)

    def _lengths(self, sizes: Sizes) -> tuple[list[int], int]:
        """Returns the length of each piece in a group, and the number of groups."""
        lengths = [math.prod(sizes[x] for x in text.split()) for text in self.sizes]
        return lengths, 1 if self.groups is None else sizes[self.groups]


@functools.cache
def parse_layout(text: str) -> Layout:
    """Returns the layout that a text such as `"(n h) d -> d n h"` describes.

    Raises:
        ValueError: If the two sides do not have the same axes, each once.
    """
    left, arrow, right = text.partition("->")
    layout = Layout(_groups(left), _groups(right))
    stored, param = _flat(layout.stored), _flat(layout.param)
    if not arrow or sorted(stored) != sorted(param) or len(set(stored)) != len(stored):
        raise ValueError(f"need the same axes on both sides of ->, got {text!r}")
    return layout


def _groups(side: str) -> tuple[tuple[str, ...], ...]:
    """Returns the axes of a side, each as the letters in its brackets or as its own."""
    found = re.findall(r"\(([^()]*)\)|(\w+)", side)
    return tuple(tuple((inside or letter).split()) for inside, letter in found)


def _flat(groups: tuple[tuple[str, ...], ...]) -> list[str]:
    return [letter for group in groups for letter in group]


def _shape(groups: tuple[tuple[str, ...], ...], sizes: Sizes) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups)
