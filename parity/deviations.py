"""Where the published code is not followed: its number, ours, and the float64 truth."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from parity.cases import Case
from parity.deviations_in_training import TEMPERATURE, cadence, temperature
from parity.outcomes import Outcome, our_outcome, torch_outcome
from parity.published import REFERENCE, Published
from parity.recorded import exact_temperature_gradient, our_temperature_gradient
from parity.rows import Deviation, Tolerance
from parity.schedule import exact_history, jitted_history
from parity.schedule import published_history as history_of
from parity.subjects import CTKD_EPOCH, SUBJECTS, Subject
from parity.torch_exact import exact_loss
from parity.torch_reference import ScheduleSettings, Settings
from taid_jax.loss import TAID, ctkd_strength

ROUNDING = Tolerance(1e-5, "relative; as in the losses: softmax and sums in float32")
T = Tolerance(1e-6, "relative; as in the schedule: a few roundings of 6e-8")
_BY_NAME = {subject.name: subject for subject in SUBJECTS}


def deviation_rows(published: Published = REFERENCE) -> list[Deviation]:
    """Returns one row per deviation, or a few where it has several faces."""
    return [
        cadence(published),
        _rounded_mixture(published),
        *_of_losses(published),
        _temperature_gradient(published),
        temperature(published),
        _nan_loss(published),
    ]


def _case(seed: int, vocab: int, scale: float) -> Case:
    rng = np.random.default_rng(seed)
    student, teacher = scale * rng.standard_normal((2, 2, 4, vocab))
    labels = rng.integers(0, vocab, (2, 4), np.int32)
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32)
    return Case(
        "",
        student.astype(np.float32),
        teacher.astype(np.float32),
        mask,
        np.where(mask, labels, -100),
    )


def _row(
    published: Published,
    subject: Subject,
    case: Case,
    name: str,
    instead: str,
    quantity: str,
    number: Callable[[Outcome], float],
    dtype: str = "float32",
    distance: float = 1e-2,
) -> Deviation:
    theirs = torch_outcome(subject, published.loss, case, dtype)
    return Deviation(
        name=name,
        instead=instead,
        quantity=quantity,
        other=published.name,
        published=number(theirs),
        ours=number(our_outcome(subject, case, "float32")),
        exact=number(torch_outcome(subject, exact_loss, case, "float64")),
        tolerance=ROUNDING,
        distance=distance,
    )


def _value(outcome: Outcome) -> float:
    return outcome.value


def _norm(outcome: Outcome) -> float:
    return float(np.linalg.norm(outcome.gradient))


def _rounded_mixture(published: Published) -> Deviation:
    case = _case(0, 101, 8.0)
    noise = 0.3 * np.random.default_rng(1).standard_normal(case.student.shape)
    student, teacher = (
        torch.tensor(logits, dtype=torch.float32).bfloat16().float().numpy()
        for logits in (case.student, case.student + noise)
    )
    case = case._replace(student=student, teacher=teacher)
    subject = dataclasses.replace(
        _BY_NAME["TAID, t = 0.25"], make=lambda: TAID(0.05), settings=Settings(t=0.05)
    )
    exact = torch_outcome(subject, exact_loss, case, "float64")
    at = np.unravel_index(np.abs(exact.gradient).argmax(), exact.gradient.shape)
    return _row(
        published,
        subject,
        case,
        "the mixture of bfloat16 logits is rounded to bfloat16",
        "float32 from the head's product on",
        "largest entry of TAID's gradient, t = 0.05, teacher 0.3 from the student",
        lambda outcome: float(outcome.gradient[at]),
        dtype="bfloat16",
        # Handing the gradient back in bfloat16 accounts for 2^-9 = 0.002 at most.
        distance=0.02,
    )


def _temperature_gradient(published: Published) -> Deviation:
    case = _case(8, 50, 2.0)
    logits = torch.tensor(case.student), torch.tensor(case.teacher)
    slope = published.temperature_gradient(*logits, torch.tensor(case.mask), CTKD_EPOCH)
    strength = float(ctkd_strength(np.float32(CTKD_EPOCH)))
    rising = 0.5 * (1 - np.cos(np.pi * CTKD_EPOCH / 10))
    return Deviation(
        name=TEMPERATURE,
        instead="the paper's definition",
        quantity=f"gradient that reaches it at epoch {CTKD_EPOCH} of 10",
        other=published.name,
        published=slope,
        ours=our_temperature_gradient(case, "float32", strength),
        exact=-float(rising) * exact_temperature_gradient(case),
        tolerance=ROUNDING,
        distance=1e-2,
    )


def _of_losses(published: Published) -> list[Deviation]:
    plain = _case(2, 33, 3.0)
    absent = np.arange(33) % 8 == 7
    infinite = plain._replace(
        student=np.where(absent, -np.inf, plain.student).astype(np.float32),
        teacher=np.where(absent, -np.inf, plain.teacher).astype(np.float32),
        labels=np.where(plain.labels % 8 == 7, plain.labels - 1, plain.labels),
    )
    divergences = ("reverse KL", "JS", "skew forward KL", "skew reverse KL")
    table = (
        (
            "-inf logits give NaN",
            "finite",
            infinite,
            dict.fromkeys(("TAID, t = 0", "TAID, t = 1", "DKD"), (_value,))
            | dict.fromkeys((*divergences, "adaptive KL"), (_norm,))
            | {"TAID, t = 1": (_norm, _value)},
        ),
        (
            "adaptive KL masks unsorted gaps in sorted order; gradient in its weights",
            "the paper's definition",
            _case(3, 50, 2.0),
            {"adaptive KL": (_value, _norm)},
        ),
        (
            "DKD divides by all positions, padding included",
            "by counted tokens",
            _case(4, 50, 2.0),
            {"DKD": (_value,)},
        ),
        (
            "JS and skew losses are NaN when a probability underflows",
            "computed from log-probabilities",
            _case(5, 50, 120.0),
            dict.fromkeys(divergences[1:], (_value,)),
        ),
    )
    quantities = {_value: "loss", _norm: "gradient's norm"}
    return [
        _row(
            published,
            _BY_NAME[subject],
            case,
            name,
            instead,
            f"{subject}, {quantities[number]}",
            number,
        )
        for name, instead, case, subjects in table
        for subject, numbers in subjects.items()
        for number in numbers
    ]


def _nan_loss(published: Published) -> Deviation:
    settings: ScheduleSettings = {"num_train_steps": 400, "alpha": 0.02, "beta": 0.9}
    losses = np.linspace(9.0, 5.0, 200).astype(np.float32)
    losses[50] = np.nan
    return Deviation(
        name="one NaN loss ends adaptation for good: t falls back to the line",
        instead="the schedule keeps its state",
        quantity="t at step 200 of 400, after a NaN at step 50",
        other=published.name,
        published=float(history_of(settings, losses, published).t[-1]),
        ours=float(jitted_history(settings, losses).t[-1]),
        exact=float(exact_history(settings, losses).t[-1]),
        tolerance=T,
        distance=1e-2,
    )
