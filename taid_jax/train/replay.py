"""Answers of the student that are kept to be trained on again."""

import base64
import collections
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from taid_jax.data.tokens import Example


class ReplayBuffer:
    """The newest answers, up to a capacity.

    Args:
        capacity: When it is full, the oldest goes for each that comes.
    """

    def __init__(self, capacity: int):
        self._examples: collections.deque[Example] = collections.deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    @property
    def full(self) -> bool:
        """Whether it holds as many as it can."""
        return len(self._examples) == self._examples.maxlen

    def add(self, examples: Iterable[Example]) -> None:
        """Takes examples in, in order."""
        self._examples.extend(examples)

    def draw(self, rng: np.random.Generator, size: int) -> list[Example]:
        """Returns `size` different examples, all equally probable."""
        places = rng.choice(len(self._examples), size, replace=False)
        return [self._examples[place] for place in places]

    def get_state(self) -> dict[str, Any]:
        """Returns what it holds as JSON values, tokens compressed."""
        ids = [example.ids for example in self._examples]
        counted = [example.counted for example in self._examples]
        return {
            "lengths": [len(part) for part in ids],
            "ids": _packed(np.concatenate(ids).astype("<i4") if ids else None),
            "counted": _packed(np.packbits(np.concatenate(counted)) if ids else None),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Holds what `get_state` gave, and nothing else."""
        lengths = state["lengths"]
        ids = np.frombuffer(_unpacked(state["ids"]), "<i4").astype(np.int32)
        bits = np.frombuffer(_unpacked(state["counted"]), np.uint8)
        counted = np.unpackbits(bits, count=len(ids)).astype(np.bool_)
        ends = np.cumsum(lengths)[:-1] if lengths else []
        self._examples.clear()
        if lengths:
            pairs = zip(np.split(ids, ends), np.split(counted, ends), strict=True)
            self._examples.extend(Example(*pair) for pair in pairs)


def _packed(array: np.ndarray | None) -> str:
    data = b"" if array is None else array.tobytes()
    return base64.b64encode(zlib.compress(data)).decode("ascii")


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
