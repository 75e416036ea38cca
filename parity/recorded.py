"""Rows of recorded logits: values and gradients of every objective."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.cases import Case, Recorded, recorded_cases
from parity.losses import (
    GRADIENTS,
    RECORDING,
    VALUE_FLOOR,
    compare,
    gradient_floor,
)
from parity.outcomes import (
    Outcome,
    gradient_error,
    our_outcome,
    torch_outcome,
    value_error,
)
from parity.published import REFERENCE, Published, temperature_slope
from parity.rows import Row, Tallies, Tally, Tolerance
from parity.subjects import CTKD_EPOCH, CTKD_RAW, SUBJECTS, Subject
from parity.torch_exact import exact_loss
from parity.torch_reference import ctkd_strength
from taid_jax import loss as objectives

SAME = Tolerance(
    1e-5,
    "relative; the same operations of the same PyTorch in another order: some entries "
    "in bfloat16 round the other way",
)


def recorded_rows(
    folder: pathlib.Path, subjects: Sequence[Subject] = SUBJECTS
) -> list[Row]:
    """Returns the rows of recorded logits: ours beside what was recorded.

    Where the published code is wrong, ours is held against float64 alone.

    Raises:
        RecordingError: If arrays are missing or misshapen.
    """
    subjects = [subject for subject in subjects if subject.recorded]
    tallies = Tallies("losses", [subject.name for subject in subjects])
    for recorded in recorded_cases(folder, [subject.recorded for subject in subjects]):
        case, dtype = recorded.case, recorded.dtype
        for subject in subjects:
            name = subject.recorded
            count = max(int(case.mask.sum()), 1)
            theirs = Outcome(recorded.losses[name], recorded.gradients[name] * count)
            exact = torch_outcome(subject, exact_loss, case, "float64")
            followed = subject.as_published(dtype, case)
            compare(
                tallies,
                subject,
                case,
                dtype,
                RECORDING,
                our_outcome(subject, case, dtype),
                theirs if followed else None,
                exact,
            )
    return tallies.rows()


def reference_rows(
    folder: pathlib.Path,
    published: Published = REFERENCE,
) -> list[Row]:
    """Returns the rows of a PyTorch side, which has to give what was recorded.

    Everywhere: defects and NaN included.

    Raises:
        RecordingError: If arrays are missing or misshapen.
    """
    subjects = [subject for subject in SUBJECTS if subject.recorded]
    tallies = Tallies("losses", [subject.name for subject in subjects])
    name = published.name + (" reference" if published is REFERENCE else "")
    for recorded in recorded_cases(folder, [subject.recorded for subject in subjects]):
        for subject in subjects:
            quantities = _reproduce(subject, recorded, published)
            for quantity, error in quantities.items():
                row = (name, f"{recorded.dtype} {quantity}", RECORDING)
                at = f"{recorded.case.name}, {subject.name}"
                tallies.add(row, SAME, at, error)
    return tallies.rows()


def _reproduce(
    subject: Subject, recorded: Recorded, published: Published
) -> dict[str, float]:
    """Returns the errors of a PyTorch side against a recording, NaN and all."""
    case, key = recorded.case, subject.recorded
    theirs = Outcome(recorded.losses[key], recorded.gradients[key])
    again = torch_outcome(subject, published.loss, case, recorded.dtype, total=False)
    nans = [[np.isnan(part) for part in side] for side in (theirs, again)]
    if not all(map(np.array_equal, *nans)):
        return {"value": np.inf, "gradient": np.inf}
    a, b = (
        Outcome(float(np.nan_to_num(x.value)), np.nan_to_num(x.gradient))
        for x in (again, theirs)
    )
    floor = gradient_floor(subject) / case.mask.sum()
    return {
        "value": value_error(a, b, b, VALUE_FLOOR),
        "gradient": gradient_error(a, b, b, floor),
    }


def temperature_rows(folder: pathlib.Path) -> list[Row]:
    """Returns the row of the gradient that CTKD's temperature learns from.

    The size of it: recordings have it with the published sign and strength, ours comes
    out reversed. `deviations` shows the two beside each other.

    Raises:
        RecordingError: If arrays are missing or misshapen.
    """
    row = ("losses", "CTKD", "gradient of the temperature", RECORDING)
    tally = Tally(*row, GRADIENTS["float32"])
    for recorded in recorded_cases(folder, ["ctkd"]):
        exact = exact_temperature_gradient(recorded.case)
        ours = -our_temperature_gradient(recorded.case, recorded.dtype)
        theirs = recorded.temperature_gradient / ctkd_strength(CTKD_EPOCH)
        followed = recorded.dtype == "float32" and np.isfinite(theirs)
        tally.add(
            recorded.case.name,
            abs(ours - theirs) / abs(exact) if followed else None,
            abs(ours - exact) / abs(exact),
            abs(theirs - exact) / abs(exact) if followed else None,
        )
    return [tally.row()]


def exact_temperature_gradient(case: Case) -> float:
    """Returns the slope of CTKD in the number its temperature is made of, float64."""
    student, teacher = torch.tensor(case.student), torch.tensor(case.teacher)
    mask = torch.tensor(case.mask)
    return temperature_slope(exact_loss, student.double(), teacher.double(), mask)


def our_temperature_gradient(case: Case, dtype: str, strength: float = 1.0) -> float:
    """Returns what the optimizer is given for that number: reversed, times strength."""

    def value(raw: jax.Array) -> jax.Array:
        return objectives.distillation_loss(
            objectives.CTKD(objectives.ctkd_temperature(raw), jnp.float32(strength)),
            jnp.asarray(case.student).astype(dtype),
            jnp.asarray(case.teacher).astype(dtype),
            jnp.asarray(case.mask),
            jnp.asarray(case.labels),
        )

    return float(jax.jit(jax.grad(value))(jnp.float32(CTKD_RAW)))
