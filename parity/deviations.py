"""Where the published code is not followed: its number, ours, and the float64 truth."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from taid_jax.schedule import TAIDScheduler

from parity.cases import Case
from parity.outcomes import Outcome, our_outcome, torch_outcome
from parity.rows import Deviation, Tolerance
from parity.schedule import MakeSchedule, exact_history, jitted_history
from parity.schedule import published_history as history_of
from parity.subjects import SUBJECTS, Subject, TorchLoss
from parity.torch_exact import exact_loss
from parity.torch_reference import PublishedSchedule, Settings, published_loss
from taid_jax.loss import TAID
from taid_jax.train.state import init_state
from taid_jax.train.step import make_eval_step, make_train_step
from taid_jax.types import ModelFunctions

ROUNDING = Tolerance(1e-5, "relative; as in the losses: softmax and sums in float32")
T = Tolerance(1e-6, "absolute; as in the schedule")
_BY_NAME = {subject.name: subject for subject in SUBJECTS}


class Published(NamedTuple):
    """The published side: the reference in PyTorch, or a checkout."""

    name: str = "reference"
    loss: TorchLoss = published_loss
    schedule: MakeSchedule = PublishedSchedule


_REFERENCE = Published()


def deviation_rows(published: Published = _REFERENCE) -> list[Deviation]:
    """Returns one row per deviation, or a few where it has several faces."""
    return [
        _cadence(published),
        _rounded_mixture(published),
        *_infinities(published),
        *_adaptive(published),
        _padding_in_dkd(published),
        *_underflow(published),
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


def _infinities(published: Published) -> list[Deviation]:
    case = _case(2, 33, 3.0)
    absent = np.arange(33) % 8 == 7
    case = case._replace(
        student=np.where(absent, -np.inf, case.student).astype(np.float32),
        teacher=np.where(absent, -np.inf, case.teacher).astype(np.float32),
        labels=np.where(case.labels % 8 == 7, case.labels - 1, case.labels),
    )
    faces = {
        "TAID, t = 0": (("loss", _value),),
        "TAID, t = 1": (("gradient's norm", _norm), ("loss", _value)),
        "reverse KL": (("gradient's norm", _norm),),
        "JS": (("gradient's norm", _norm),),
        "skew forward KL": (("gradient's norm", _norm),),
        "skew reverse KL": (("gradient's norm", _norm),),
        "adaptive KL": (("gradient's norm", _norm),),
        "DKD": (("loss", _value),),
    }
    return [
        _row(
            published,
            _BY_NAME[name],
            case,
            "-inf logits give NaN",
            "finite",
            f"{name}, {quantity}",
            number,
        )
        for name, numbers in faces.items()
        for quantity, number in numbers
    ]


def _adaptive(published: Published) -> list[Deviation]:
    case, subject = _case(3, 50, 2.0), _BY_NAME["adaptive KL"]
    name = "adaptive KL masks unsorted gaps in sorted order; gradient in its weights"
    instead = "the paper's definition"
    return [
        _row(published, subject, case, name, instead, "loss", _value),
        _row(published, subject, case, name, instead, "gradient's norm", _norm),
    ]


def _padding_in_dkd(published: Published) -> Deviation:
    return _row(
        published,
        _BY_NAME["DKD"],
        _case(4, 50, 2.0),
        "DKD divides by all positions, padding included",
        "by counted tokens",
        "loss, 5 of 8 positions counted",
        _value,
    )


def _underflow(published: Published) -> list[Deviation]:
    case = _case(5, 50, 120.0)
    return [
        _row(
            published,
            _BY_NAME[name],
            case,
            "JS and skew losses are NaN when a probability underflows",
            "computed from log-probabilities",
            f"{name}, loss at scale 120",
            _value,
        )
        for name in ("JS", "skew forward KL", "skew reverse KL")
    ]


def _nan_loss(published: Published) -> Deviation:
    settings = {"num_train_steps": 400, "alpha": 0.02, "beta": 0.9}
    losses = np.linspace(9.0, 5.0, 200).astype(np.float32)
    losses[50] = np.nan
    return Deviation(
        name="one NaN loss ends adaptation for good: t falls back to the line",
        instead="the schedule keeps its state",
        quantity="t at step 200 of 400, after a NaN at step 50",
        other=published.name,
        published=history_of(settings, losses, published.schedule).t[-1],
        ours=jitted_history(settings, losses).t[-1],
        exact=exact_history(settings, losses).t[-1],
        tolerance=T,
        distance=1e-2,
    )


_STEPS, _PARTS, _VOCAB = 6, 4, 11
_CADENCE = {"num_train_steps": _STEPS, "t_start": 0.2, "alpha": 0.05, "beta": 0.9}


def _cadence(published: Published) -> Deviation:
    rng = np.random.default_rng(6)
    student, teacher = rng.standard_normal((2, _VOCAB, _VOCAB)).astype(np.float32)
    batches = rng.integers(0, _VOCAB, (_STEPS, 8, 5), np.int32)
    lengths = rng.integers(2, 6, (_STEPS, 8, 1))
    labels = np.where(np.arange(5) < lengths, batches, -100)

    def loss(t: float, rows: slice, step: int, form: TorchLoss, dtype: torch.dtype):
        ids = torch.tensor(batches[step, rows, :-1]).long()
        following = torch.tensor(labels[step, rows, 1:]).long()
        return form(
            "taid",
            torch.tensor(student, dtype=dtype)[ids],
            torch.tensor(teacher, dtype=dtype)[ids],
            (following != -100).int(),
            following,
            Settings(t=t),
        )

    everything = slice(None)
    schedule = published.schedule(**_CADENCE)
    for step in range(_STEPS):
        for part in range(_PARTS):
            rows = slice(2 * part, 2 * part + 2)
            t = float(schedule.t)
            schedule.update(loss(t, rows, step, published.loss, torch.float32), step)
        if step % 3 == 2:  # A validation after every third step.
            t = float(schedule.t)
            validation = loss(t, everything, 0, published.loss, torch.float32)
            schedule.update(validation, step)

    exact = [_CADENCE["t_start"]]
    whole: list[float] = []
    for step in range(_STEPS):
        whole.append(
            float(loss(exact[-1], everything, step, exact_loss, torch.float64))
        )
        exact.append(float(exact_history(_CADENCE, np.array(whole)).t[-1]))
    return Deviation(
        name="t advances per micro-batch, on each rank's own loss, and in validation",
        instead="once per optimizer step, on the global token-weighted loss",
        quantity=f"t after {_STEPS} steps of {_PARTS} micro-batches, 2 validations",
        other=published.name,
        published=float(schedule.t),
        ours=_our_cadence(student, teacher, batches, labels),
        exact=exact[-1],
        tolerance=T,
        distance=1e-2,
    )


def _our_cadence(
    student: np.ndarray, teacher: np.ndarray, batches: np.ndarray, labels: np.ndarray
) -> float:
    """Returns t after the real train step has accumulated over micro-batches."""
    bigram = ModelFunctions(
        logits=lambda params, batch: params["table"][batch["input_ids"]]
    )
    scheduler = TAIDScheduler(**_CADENCE)
    optimizer = optax.sgd(0.0)
    state = init_state(
        {"table": jnp.asarray(student)},
        optimizer=optimizer,
        schedule=scheduler.init(),
    )
    step = make_train_step(
        bigram,
        bigram,
        make_objective=lambda schedule, learned, step: TAID(schedule.t),
        scheduler=scheduler,
        optimizer=optimizer,
        grad_accum=_PARTS,
    )
    evaluate = make_eval_step(bigram, bigram, TAID(1.0))
    target = {"table": jnp.asarray(teacher)}
    for index, (ids, following) in enumerate(zip(batches, labels, strict=True)):
        batch = {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(following)}
        state, _ = step(state, target, batch)
        if index % 3 == 2:
            jax.block_until_ready(evaluate(state.params, target, batch))
    return float(state.schedule.t)
