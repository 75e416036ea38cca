"""Rows of values and gradients: every objective, ours beside PyTorch and float64."""

from collections.abc import Iterable, Sequence

import numpy as np

from parity.cases import Case, Grid, random_cases
from parity.outcomes import (
    Outcome,
    Reduce,
    gradient_error,
    our_outcome,
    rounded,
    torch_outcome,
    value_error,
)
from parity.published import REFERENCE, Published
from parity.rows import Row, Tallies, Tolerance, triple
from parity.subjects import SUBJECTS, Subject
from parity.torch_exact import exact_loss
from taid_jax.loss import distillation_loss

CORRECTED, RECORDING = f"{REFERENCE.name}, corrected", "recording"
VALUE = Tolerance(
    1e-5,
    "relative; softmax in float32: at scale 30 an exponent reaches 130, and its "
    "rounding, 130 * 2^-24 = 8e-6, is the relative error of a probability",
)
# 1 + x is held to 2^-24, and log and exp to an ulp or two: a log-probability is known
# to about 5e-7, and a value to 1e-5 of itself from here on.
VALUE_FLOOR = 0.05
GRADIENTS = {
    "float32": VALUE,
    "bfloat16": Tolerance(
        2.0**-8,
        "norm of the difference over the norm; the gradient is handed back in "
        "bfloat16, each side rounding its entries by up to 2^-9",
    ),
    "float16": Tolerance(
        2.0**-10,
        "norm of the difference over the norm; the gradient is handed back in "
        "float16, each side rounding its entries by up to 2^-11, or 2^-25 below 2^-14",
    ),
}
NEAR = Tolerance(
    1e-3,
    "norm of the difference over the norm; teacher 1e-3 from the student: a difference "
    "of two softmaxes, each held to 6e-8 * |log p| = 6e-7, keeps 6e-4 of itself",
)
NOTHING = Tolerance(0.0, "exactly 0: no token counts")
_GRID = Grid()


def gradient_floor(subject: Subject) -> float:
    """Returns the norm per token that a gradient's error is at least relative to."""
    # Where the gradient can vanish, both sides keep absolute digits: relative to 0.1
    # per token. The others only meet float64's own rounding of a gradient that is 0.
    return 0.1 if subject.vanishes else 1e-9


def other_side(subject: Subject) -> str:
    """Returns the name of PyTorch without what the published code has wrong."""
    return REFERENCE.name if subject.later else CORRECTED


def compare(
    tallies: Tallies,
    subject: Subject,
    case: Case,
    dtype: str,
    other: str,
    ours: Outcome,
    theirs: Outcome | None,
    exact: Outcome,
) -> None:
    """Adds a case to the rows of a subject's value and gradient.

    `other` names the other side, which is None where it is wrong.
    """
    floor = gradient_floor(subject)
    absolute = 2.0**-14 * case.student.size**0.5 if dtype == "float16" else 0.0
    sides = ours, theirs, exact
    values = triple(lambda a, b: value_error(a, b, exact, VALUE_FLOOR), *sides)
    gradients = triple(
        lambda a, b: gradient_error(a, b, exact, floor, absolute), *sides
    )
    near = " near" if case.near else ""
    key = (subject.name, f"{dtype} value{near}", other)
    tallies.add(key, VALUE, case.name, *values)
    key = (subject.name, f"{dtype} gradient{near}", other)
    # Targets that start near the student have to be exact there; nothing else has.
    close = case.near and subject.reference not in ("taid", "alpha_mixture")
    tolerance = NEAR if close else GRADIENTS[dtype]
    tallies.add(key, tolerance, case.name, *gradients)


def random_rows(
    seeds: Iterable[int],
    grid: Grid = _GRID,
    subjects: Sequence[Subject] = SUBJECTS,
    published: Published = REFERENCE,
    reduce: Reduce = distillation_loss,
) -> list[Row]:
    """Returns the rows of random logits, one per objective, dtype and quantity.

    `published` is the PyTorch side where it is right; `reduce` our mean over tokens.
    """
    tallies = Tallies("losses", [subject.name for subject in subjects])
    for seed in seeds:
        for case in random_cases(grid, seed):
            for dtype in ("float32",) if case.wide_only else grid.dtypes:
                for subject in subjects:
                    if case.near and subject.reference == "adaptive_kl":
                        # Its weights are ratios of p - q, which float32 cannot hold.
                        continue
                    ours = our_outcome(subject, case, dtype, reduce)
                    if case.empty:
                        key = ("no token counts", f"{dtype} value and gradient", "0")
                        size = abs(ours.value) + float(np.abs(ours.gradient).sum())
                        tallies.add(key, NOTHING, subject.name, size)
                        continue
                    followed = subject.as_published(dtype, case)
                    loss = published.loss if followed else exact_loss
                    theirs = torch_outcome(subject, loss, case, dtype)
                    exact = torch_outcome(
                        subject, exact_loss, rounded(case, dtype), "float64"
                    )
                    side = published.name if followed else other_side(subject)
                    compare(tallies, subject, case, dtype, side, ours, theirs, exact)
    return tallies.rows()
