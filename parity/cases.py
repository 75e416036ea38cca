"""Logits to compare two sides on: random, and recorded."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from parity.recordings import case_names, check_arrays, load_arrays

DTYPES = ("float32", "bfloat16", "float16")


class Case(NamedTuple):
    """Logits and labels of one comparison.

    Attributes:
        name: For the row's note.
        student: `(*tokens, vocab)` float32.
        teacher: The same.
        mask: `(*tokens,)` int32.
        labels: `(*tokens,)` int32, aligned with the logits.
        near: The teacher is nearly the student, so that gradients nearly cancel.
        wide_only: For float32 alone: near teachers, which other formats round onto
            the student, and every second scale, to save time.
    """

    name: str
    student: np.ndarray
    teacher: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    near: bool = False
    wide_only: bool = False

    @property
    def infinite(self) -> bool:
        """Whether a logit is -inf."""
        return bool(np.isinf(self.student).any() or np.isinf(self.teacher).any())

    @property
    def empty(self) -> bool:
        """Whether no token counts."""
        return not self.mask.any()

    @property
    def underflows(self) -> bool:
        """Whether both probabilities of some entry are 0 in float32, or nearly."""
        largest = np.maximum(_log_softmax(self.student), _log_softmax(self.teacher))
        return bool(largest.min() < np.log(np.finfo(np.float32).tiny))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which random cases are made; the scales are deviations of the logits."""

    scales: Sequence[float] = (0.1, 1.0, 3.0, 10.0, 30.0)
    vocabs: Sequence[int] = (7, 1000, 50_000)
    dtypes: Sequence[str] = DTYPES


_MASKS = {
    "full mask": np.ones((2, 3), np.int32),
    "one token": np.array([[0, 1, 0], [0, 0, 0]], np.int32),
    "empty mask": np.zeros((2, 3), np.int32),
}


def random_cases(grid: Grid, seed: int) -> Iterator[Case]:
    """Yields random cases: scales and vocabularies, then masks, -inf, near teachers."""
    rng = np.random.default_rng(seed)

    def case(name: str, scale: float, vocab: int, mask: np.ndarray | None) -> Case:
        tokens = (2, 3) if vocab < 10_000 else (1, 2)
        student, teacher = scale * rng.standard_normal((2, *tokens, vocab))
        labels = rng.integers(0, vocab, tokens, np.int32)
        if mask is None:
            mask = (rng.random(tokens) < 0.7).astype(np.int32)
            mask.flat[0], mask.flat[-1] = 1, 0
        mask = mask[: tokens[0], : tokens[1]]
        return Case(
            f"seed {seed}, vocabulary {vocab}, scale {scale:g}{name}",
            student.astype(np.float32),
            teacher.astype(np.float32),
            mask,
            # A token that does not count has no label, as in a real batch.
            np.where(mask, labels, -100),
        )

    for vocab, (index, scale) in itertools.product(grid.vocabs, enumerate(grid.scales)):
        yield case("", scale, vocab, None)._replace(wide_only=index % 2 == 1)
    vocab = grid.vocabs[len(grid.vocabs) // 2]
    for name, mask in _MASKS.items():
        yield case(f", {name}", 3.0, vocab, mask)
    for scale in (1.0, 10.0):
        yield _with_infinities(case(", -inf", scale, vocab, None), rng)
        near = case(", near teacher", scale, vocab, None)
        noise = 1e-3 * rng.standard_normal(near.student.shape).astype(np.float32)
        teacher = near.student + noise.astype(np.float32)
        yield near._replace(teacher=teacher, near=True, wide_only=True)


def _with_infinities(case: Case, rng: np.random.Generator) -> Case:
    shared = rng.random(case.student.shape) < 0.2
    of_student = shared | (rng.random(case.student.shape) < 0.1)
    np.put_along_axis(of_student, np.maximum(case.labels, 0)[..., None], False, axis=-1)
    shared &= of_student
    return case._replace(
        student=np.where(of_student, -np.inf, case.student).astype(np.float32),
        teacher=np.where(shared, -np.inf, case.teacher).astype(np.float32),
    )


class Recorded(NamedTuple):
    """A case of a recording, and what the published code made of it.

    Attributes:
        case: Its logits.
        dtype: What the logits were when it was recorded.
        losses: Mean loss by recorded name.
        gradients: Gradient of that mean, by recorded name.
        temperature_gradient: Of CTKD's raw temperature.
    """

    case: Case
    dtype: str
    losses: dict[str, float]
    gradients: dict[str, np.ndarray]
    temperature_gradient: float


def recorded_cases(folder: pathlib.Path, names: Sequence[str]) -> list[Recorded]:
    """Returns the cases of a folder's `losses.npz`, with the objectives that are named.

    Raises:
        RecordingError: Naming every array that is missing or misshapen.
    """
    path = folder / "losses.npz"
    arrays = load_arrays(path)
    found = []
    for name in case_names(path, arrays):
        check_arrays(path, arrays, _shapes(arrays, name, names))
        labels = arrays[f"{name}/labels"][:, 1:]
        found.append(
            Recorded(
                case=Case(
                    f"recorded case {name}",
                    arrays[f"{name}/student"],
                    arrays[f"{name}/teacher"],
                    arrays[f"{name}/mask"],
                    labels.astype(np.int32),
                ),
                dtype=str(arrays[f"{name}/dtype"]),
                losses={o: float(arrays[f"{name}/{o}/loss"]) for o in names},
                gradients={o: arrays[f"{name}/{o}/grad"] for o in names},
                temperature_gradient=float(arrays[f"{name}/ctkd/grad_temperature"]),
            )
        )
    return found


def _shapes(
    arrays: dict[str, np.ndarray], case: str, names: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    student = arrays.get(f"{case}/student", np.empty((0, 0, 0)))
    batch, length, vocab = student.shape if student.ndim == 3 else (0, 0, 0)
    logits = (batch, length, vocab)
    shapes: dict[str, tuple[int, ...]] = {
        f"{case}/student": logits,
        f"{case}/teacher": logits,
        f"{case}/mask": (batch, length),
        f"{case}/labels": (batch, length + 1),
        f"{case}/dtype": (),
        f"{case}/ctkd/grad_temperature": (),
    }
    for name in names:
        shapes |= {f"{case}/{name}/loss": (), f"{case}/{name}/grad": logits}
    return shapes
