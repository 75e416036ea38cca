"""How a tensor of a checkpoint becomes a parameter: a small language of named axes.

`"(n h) d -> d n h"` says that the checkpoint stores a matrix whose rows are heads times
head width and whose columns are the model's width, and that the parameter has these
three axes in the order on the right. Brackets hold axes that are one axis together, the
slowest first. Both directions follow from the one text, and so does which part of the
stored tensor a device needs for its part of the parameter.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

Sizes = Mapping[str, int]
"""The size of each axis letter."""

Index = tuple[slice, ...]
"""A slice with start and stop for each axis."""


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

    def param_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Returns the shape of the parameter of one layer."""
        return _shape(self.param, sizes)

    def of_bias(self) -> "Layout":
        """Returns the layout of the bias of a linear map stored with this one.

        Checkpoints store a matrix with its outputs first, and the bias along these.
        """
        outputs = set(self.stored[0])
        param = (tuple(x for x in axis if x in outputs) for axis in self.param)
        return Layout(self.stored[:1], tuple(axis for axis in param if axis))

    def to_stored(self, param: np.ndarray, sizes: Sizes) -> np.ndarray:
        """Returns a parameter of one layer as the checkpoint stores it."""
        letters = _flat(self.param)
        order = [letters.index(letter) for letter in _flat(self.stored)]
        split = param.reshape([sizes[letter] for letter in letters])
        return split.transpose(order).reshape(self.stored_shape(sizes))

    def read(
        self, fetch: Callable[[Index], np.ndarray], index: Index, sizes: Sizes
    ) -> np.ndarray:
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
        cut_already: set[str] = set()
        # Of axes that are stored as one, a part of the first is a range of the whole;
        # parts of the others are cut out in memory.
        for first, *rest in self.stored:
            whole = slice(0, sizes[first])
            cut = wanted.get(first, whole)
            inner = math.prod(sizes[letter] for letter in rest)
            there.append(slice(cut.start * inner, cut.stop * inner))
            split += [cut.stop - cut.start, *(sizes[letter] for letter in rest)]
            cut_already.add(first)
        letters = _flat(self.stored)
        order = [letters.index(letter) for letter in _flat(self.param)]
        block = fetch(tuple(there)).reshape(split).transpose(order)
        length = dict(zip(letters, split, strict=True))
        block = block.reshape(_shape(self.param, length))
        rest = tuple(
            slice(None) if len(axis) == 1 and axis[0] in cut_already else cut
            for axis, cut in zip(self.param, index, strict=True)
        )
        return block[rest]


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
    groups: list[tuple[str, ...]] = []
    inside: list[str] | None = None
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            inside = []
        elif token == ")":
            groups.append(tuple(inside or ()))
            inside = None
        elif inside is not None:
            inside.append(token)
        else:
            groups.append((token,))
    return tuple(groups)


def _flat(groups: tuple[tuple[str, ...], ...]) -> list[str]:
    return [letter for group in groups for letter in group]


def _shape(groups: tuple[tuple[str, ...], ...], sizes: Sizes) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in group) for group in groups)
