"""Completions that are kept to be trained on, and how often and how late they were."""

import base64
import collections
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from taid_jax.data.tokens import Example

End = Literal["ended", "truncated", "empty"]


class Completion(NamedTuple):
    """A prompt with what a model wrote to it.

    Attributes:
        example: The tokens of both; the completion is its last answer.
        step: That it was written before.
        ended: Whether the model ended it, and not the limit of its tokens.
        uses: How often it was trained on.
        beside: The teacher's text of the same prompt, with texts that are pairs.
    """

    example: Example
    step: int
    ended: bool
    uses: int = 0
    beside: Example | None = None

    @property
    def texts(self) -> tuple[Example, ...]:
        """The completion and, of a pair, the teacher's text."""
        return (self.example, *([] if self.beside is None else [self.beside]))

    @property
    def length(self) -> int:
        """Tokens that the model wrote, the one that ends it included."""
        return self.example.answer_end - self.example.prompt

    @property
    def end(self) -> End:
        """How it ends: `empty` if nothing but its end was written."""
        if not self.ended:
            return "truncated"
        return "ended" if self.length > 1 else "empty"


class ReplayBuffer:
    """The newest completions, up to a capacity: the oldest goes for each that comes.

    Args:
        capacity: Completions at most.
        reuse: A completion leaves when it was trained on so often; never when None.

    Attributes:
        unused: Completions that the capacity pushed out before they were trained on.
        ages: How many completions were trained on by their age: steps since they were
            written.
    """

    def __init__(self, capacity: int, reuse: int | None = None):
        self._capacity, self._reuse = capacity, reuse
        self._kept: list[Completion] = []
        self.unused = 0
        self.ages: collections.Counter[int] = collections.Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Completion]:
        return iter(self._kept)

    @property
    def full(self) -> bool:
        """Whether it holds as many as it can."""
        return len(self._kept) == self._capacity

    def add(self, completions: Iterable[Completion]) -> None:
        """Takes completions in, in order."""
        self._kept += completions
        beyond = max(0, len(self._kept) - self._capacity)
        self.unused += sum(not each.uses for each in self._kept[:beyond])
        del self._kept[:beyond]

    def draw(self, rng: np.random.Generator, *, new: bool = False) -> list[int]:
        """Returns the places of all completions, or the untrained, in random order."""
        places = [n for n, each in enumerate(self._kept) if not (new and each.uses)]
        return rng.permutation(places).astype(int).tolist()

    def use(self, places: Sequence[int], step: int) -> list[Completion]:
        """Returns the completions at these places, which a step trains on."""
        used = [self._kept[place] for place in places]
        for place, each in zip(places, used, strict=True):
            self._kept[place] = each._replace(uses=each.uses + 1)
            self.ages[step - each.step] += 1
        if self._reuse is not None:
            self._kept = [each for each in self._kept if each.uses < self._reuse]
        return used

    def get_state(self) -> dict[str, Any]:
        """Returns what it holds as JSON values, tokens compressed."""
        beside = [each.beside for each in self._kept if each.beside is not None]
        return {
            **_write([each.example for each in self._kept]),
            **({"beside": _write(beside)} if beside else {}),
            "steps": [each.step for each in self._kept],
            "ended": [each.ended for each in self._kept],
            "uses": [each.uses for each in self._kept],
            "unused": self.unused,
            "ages": sorted(self.ages.items()),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Holds what `get_state` gave, and nothing else."""
        examples = _read(state)
        beside: Sequence[Example | None] = [None] * len(examples)
        if "beside" in state:
            beside = _read(state["beside"])
        columns = (state[name] for name in ("steps", "ended", "uses"))
        self._kept = [
            Completion(*each) for each in zip(examples, *columns, beside, strict=True)
        ]
        self.unused = state["unused"]
        self.ages = collections.Counter(dict(state["ages"]))


def _write(examples: Sequence[Example]) -> dict[str, Any]:
    """Returns examples that end with their answer as JSON values."""
    # A token's lowest bit says whether it counts.
    tokens = [2 * each.ids.astype("<i8") + each.counted for each in examples]
    data = zlib.compress(b"".join(row.tobytes() for row in tokens))
    teachers = [each.teacher for each in examples if each.teacher is not None]
    return {
        **({"teacher": _write(teachers)} if teachers else {}),
        "lengths": [len(row) for row in tokens],
        "tokens": base64.b64encode(data).decode("ascii"),
        "prompts": [example.prompt for example in examples],
    }


def _read(state: Mapping[str, Any]) -> list[Example]:
    """Returns what `_write` was given."""
    data = zlib.decompress(base64.b64decode(state["tokens"]))
    tokens = np.frombuffer(data, "<i8")
    ids, counted = (tokens >> 1).astype(np.int32), tokens % 2 == 1
    ends = itertools.accumulate(state["lengths"], initial=0)
    spans = zip(itertools.pairwise(ends), state["prompts"], strict=True)
    teachers: Sequence[Example | None] = [None] * len(state["lengths"])
    if "teacher" in state:
        teachers = _read(state["teacher"])
    return [
        Example(ids[start:stop], counted[start:stop], prompt, stop - start, teacher)
        for ((start, stop), prompt), teacher in zip(spans, teachers, strict=True)
    ]
