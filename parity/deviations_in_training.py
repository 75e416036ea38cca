"""Deviations that only a training run shows: how t and CTKD's temperature move."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from parity.published import Published
from parity.rows import Deviation, Tolerance
from parity.schedule import exact_history
from parity.subjects import CTKD_RAW, TorchLoss
from parity.torch_exact import exact_loss
from parity.torch_reference import (
    ScheduleSettings,
    Settings,
    ctkd_temperature,
    published_loss,
)
from taid_jax.loss import TAID
from taid_jax.schedule import TAIDScheduler
from taid_jax.settings import ObjectiveSettings
from taid_jax.train.evaluate import make_eval_step
from taid_jax.train.objective import MakeObjective, make_objective
from taid_jax.train.state import DistillState, init_state
from taid_jax.train.step import make_train_step
from taid_jax.types import ModelFunctions, Params

STEPS, PARTS, VOCAB, EVERY = 6, 4, 11, 3
_SCHEDULE: ScheduleSettings = {
    "num_train_steps": 60,
    "t_start": 0.2,
    "alpha": 0.05,
    "beta": 0.9,
}
_SAME = Tolerance(1e-6, "relative; as in the schedule: a few roundings of 6e-8")
_RATE = 0.05
TEMPERATURE = (
    "CTKD's temperature is never given to the optimizer, its gradient is not reversed, "
    "its ramp runs from 1 to 0"
)
"""The deviation that has a row here and one beside the losses."""
_BIGRAM = ModelFunctions(
    logits=lambda params, batch: params["table"][batch["input_ids"]]
)


class Bigrams(NamedTuple):
    """Two models that are tables of logits, and batches for them.

    Attributes:
        student: `(vocab, vocab)` float32.
        teacher: The same.
        ids: `(steps, batch, length)` int32.
        labels: The same, aligned with the inputs, -100 where not counted.
    """

    student: np.ndarray
    teacher: np.ndarray
    ids: np.ndarray
    labels: np.ndarray

    def loss(
        self,
        form: TorchLoss,
        name: str,
        settings: Settings,
        step: int,
        rows: slice,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Returns the mean loss over some rows of a batch, in PyTorch."""
        ids = torch.tensor(self.ids[step, rows, :-1]).long()
        following = torch.tensor(self.labels[step, rows, 1:]).long()
        return form(
            name,
            torch.tensor(self.student, dtype=dtype)[ids],
            torch.tensor(self.teacher, dtype=dtype)[ids],
            (following != -100).int(),
            following,
            settings,
        )

    def batch(self, step: int) -> dict[str, jax.Array]:
        """Returns a batch for our train step."""
        ids, labels = self.ids[step], self.labels[step]
        return {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(labels)}


def random_bigrams(seed: int) -> Bigrams:
    """Returns tables, and batches whose rows count unequal numbers of tokens."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.standard_normal((2, VOCAB, VOCAB)).astype(np.float32)
    ids = rng.integers(0, VOCAB, (STEPS, 2 * PARTS, 5), np.int32)
    lengths = rng.integers(2, 6, (STEPS, 2 * PARTS, 1))
    return Bigrams(student, teacher, ids, np.where(np.arange(5) < lengths, ids, -100))


def cadence(published: Published) -> Deviation:
    """Returns the row of how often t advances."""
    bigrams = random_bigrams(6)
    return Deviation(
        name="t advances per micro-batch, on each rank's own loss, and in validation",
        instead="once per optimizer step, on the global token-weighted loss",
        quantity=f"t after {STEPS} steps of {PARTS} micro-batches, 2 validations",
        other=published.name,
        published=_published_cadence(published, bigrams),
        ours=_our_cadence(bigrams),
        exact=_exact_cadence(bigrams),
        tolerance=_SAME,
        distance=1e-2,
    )


def _published_cadence(published: Published, bigrams: Bigrams) -> float:
    schedule = published.schedule(**_SCHEDULE)

    def advance(on_batch: int, rows: slice, step: int) -> None:
        settings = Settings(t=float(schedule.t))
        value = bigrams.loss(
            published.loss, "taid", settings, on_batch, rows, torch.float32
        )
        schedule.update(value, step)

    for step in range(STEPS):
        for part in range(PARTS):
            advance(step, slice(2 * part, 2 * part + 2), step)
        if step % EVERY == EVERY - 1:
            advance(0, slice(None), step)
    return float(schedule.t)


def _exact_cadence(bigrams: Bigrams) -> float:
    t, losses = _SCHEDULE.get("t_start", 0.4), []
    for step in range(STEPS):
        settings = Settings(t=t)
        value = bigrams.loss(
            exact_loss, "taid", settings, step, slice(None), torch.float64
        )
        losses.append(float(value))
        t = float(exact_history(_SCHEDULE, np.array(losses)).t[-1])
    return t


def _train(
    bigrams: Bigrams,
    scheduler: TAIDScheduler,
    optimizer: optax.GradientTransformation,
    objective: MakeObjective,
    learned: dict[str, jax.Array] | None = None,
    grad_accum: int = 1,
    after_step: Callable[[int, DistillState, Params], None] = lambda *_: None,
) -> DistillState:
    """Returns the state after the real train step has seen every batch."""
    student, teacher = (
        {"table": jnp.asarray(side)} for side in (bigrams.student, bigrams.teacher)
    )
    state = init_state(
        student, optimizer=optimizer, schedule=scheduler.init(), learned=learned
    )
    step = make_train_step(
        _BIGRAM,
        _BIGRAM,
        make_objective=objective,
        scheduler=scheduler,
        optimizer=optimizer,
        grad_accum=grad_accum,
    )
    for index in range(STEPS):
        state, _ = step(state, teacher, bigrams.batch(index))
        after_step(index, state, teacher)
    return state


def _our_cadence(bigrams: Bigrams) -> float:
    """Returns t after accumulation over micro-batches, with evaluations between."""
    evaluate = make_eval_step(_BIGRAM, _BIGRAM, lambda *_: TAID(1.0))

    def validate(index: int, state: DistillState, teacher: Params) -> None:
        if index % EVERY == EVERY - 1:
            jax.block_until_ready(evaluate(state, teacher, bigrams.batch(0)))

    state = _train(
        bigrams,
        TAIDScheduler(**_SCHEDULE),
        optax.sgd(0.0),
        lambda schedule, learned, step: TAID(schedule.t),
        grad_accum=PARTS,
        after_step=validate,
    )
    return float(state.schedule.t)


def temperature(published: Published) -> Deviation:
    """Returns the row of what CTKD's temperature learns in a few steps."""
    bigrams = random_bigrams(7)
    return Deviation(
        name=TEMPERATURE,
        instead="the paper's definition",
        quantity=f"number that the temperature is made of, after {STEPS} steps",
        other=published.name,
        published=_published_temperature(bigrams),
        ours=_our_temperature(bigrams),
        exact=_exact_temperature(bigrams),
        tolerance=Tolerance(1e-5, "relative; as in the losses, one gradient a step"),
        distance=1e-2,
    )


def _published_temperature(bigrams: Bigrams) -> float:
    raw = torch.tensor(CTKD_RAW, requires_grad=True)
    student = torch.tensor(bigrams.student, requires_grad=True)
    # As published: the optimizer is made of the model's parameters alone.
    optimizer = torch.optim.SGD([student], lr=_RATE)
    for step in range(STEPS):
        ids = torch.tensor(bigrams.ids[step, :, :-1]).long()
        following = torch.tensor(bigrams.labels[step, :, 1:]).long()
        value = published_loss(
            "ctkd",
            student[ids],
            torch.tensor(bigrams.teacher)[ids],
            (following != -100).int(),
            following,
            Settings(temperature=ctkd_temperature(raw)),
        )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return float(raw.detach())


def _exact_temperature(bigrams: Bigrams) -> float:
    raw = torch.tensor(CTKD_RAW, dtype=torch.float64, requires_grad=True)
    for step in range(STEPS):
        settings = Settings(temperature=ctkd_temperature(raw))
        value = bigrams.loss(
            exact_loss, "ctkd", settings, step, slice(None), torch.float64
        )
        (slope,) = torch.autograd.grad(value, raw)
        strength = 0.5 * (1 - math.cos(math.pi * step / STEPS))
        # Against the student: uphill.
        raw = (raw + _RATE * strength * slope).detach().requires_grad_()
    return float(raw.detach())


def _our_temperature(bigrams: Bigrams) -> float:
    """Returns the learned number, the student held still."""
    settings = ObjectiveSettings(objective="ctkd", ctkd_ramp_steps=STEPS)
    objective, learned = make_objective(settings, STEPS)
    optimizer = optax.multi_transform(
        {"held": optax.set_to_zero(), "learned": optax.sgd(_RATE)},
        ({"table": "held"}, {"raw_temperature": "learned"}),
    )
    state = _train(bigrams, TAIDScheduler(STEPS), optimizer, objective, learned)
    return float(state.learned["raw_temperature"])
