"""Rows of the fused head: losses and gradients from hidden states, without logits."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.cases import Case
from parity.losses import VALUE_FLOOR, gradient_floor, other_side
from parity.published import REFERENCE
from parity.rows import Row, Tallies, Tolerance, triple
from parity.subjects import SUBJECTS, Subject, TorchLoss
from parity.torch_exact import exact_loss
from taid_jax.loss import Objective, fused_loss
from taid_jax.types import Head

TOLERANCE = Tolerance(
    1e-5,
    "relative; a logit is a sum of 24 products, held to sqrt(24) * 6e-8 = 3e-7 of its "
    "size, and its error is the relative error of a probability",
)
QUANTITIES = {
    "value": "value",
    "gradient of the hidden states": "hidden",
    "gradient of the head": "kernel",
}
TOKENS, WIDTH, TEACHER_WIDTH, VOCAB, CHUNK = (2, 5), 24, 40, 500, 4


class Hidden(NamedTuple):
    """Hidden states and heads of both models, mask and labels."""

    student: np.ndarray
    student_kernel: np.ndarray
    teacher: np.ndarray
    teacher_kernel: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


class Gradients(NamedTuple):
    """The mean loss, and the gradients of the sum over counted tokens."""

    value: float
    hidden: np.ndarray
    kernel: np.ndarray


def random_hidden(seed: int, scale: float) -> Hidden:
    """Returns hidden states whose logits have a standard deviation of `scale`."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    mask = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]], np.int32)
    labels = rng.integers(0, VOCAB, TOKENS, np.int32)
    return Hidden(
        normal(*TOKENS, WIDTH),
        normal(WIDTH, VOCAB) * np.float32(scale / WIDTH**0.5),
        normal(*TOKENS, TEACHER_WIDTH),
        normal(TEACHER_WIDTH, VOCAB) * np.float32(scale / TEACHER_WIDTH**0.5),
        mask,
        np.where(mask, labels, -100),
    )


def torch_gradients(
    subject: Subject, loss: TorchLoss, hidden: Hidden, dtype: torch.dtype
) -> Gradients:
    """Returns the PyTorch side, which builds the logits."""
    student, kernel = (
        torch.tensor(array).to(dtype).requires_grad_()
        for array in (hidden.student, hidden.student_kernel)
    )
    teacher = torch.tensor(hidden.teacher).to(dtype) @ torch.tensor(
        hidden.teacher_kernel
    ).to(dtype)
    mask, labels = torch.tensor(hidden.mask), torch.tensor(hidden.labels).long()
    value = loss(
        subject.reference, student @ kernel, teacher, mask, labels, subject.settings
    )
    gradients = torch.autograd.grad(value * mask.sum(), (student, kernel))
    return Gradients(float(value.detach()), *(g.double().numpy() for g in gradients))


@jax.jit
def _value_and_gradients(
    objective: Objective,
    student: jax.Array,
    student_kernel: jax.Array,
    teacher: jax.Array,
    teacher_kernel: jax.Array,
    mask: jax.Array,
    labels: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def total(student: jax.Array, kernel: jax.Array):
        return fused_loss(
            objective,
            student,
            Head(kernel),
            teacher,
            Head(teacher_kernel),
            mask,
            labels,
            chunk_size=CHUNK,
        )

    grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (loss_sum, sums), gradients = grad(student, student_kernel)
    return loss_sum / sums["num_tokens"], gradients


def our_gradients(subject: Subject, hidden: Hidden) -> Gradients:
    """Returns our side, which does not."""
    inputs = (jnp.asarray(array) for array in hidden)
    value, gradients = _value_and_gradients(subject.make(), *inputs)
    return Gradients(float(value), *(np.asarray(g, np.float64) for g in gradients))


def _errors(sides: Sequence[Any], floor: float) -> list[float | None]:
    norm = max(float(np.linalg.norm(sides[-1])), floor)
    return triple(lambda a, b: np.linalg.norm(a - b) / norm, *sides)


def random_rows(
    seeds: Iterable[int],
    subjects: Sequence[Subject] = SUBJECTS,
    scales: Sequence[float] = (1.0, 3.0),
) -> list[Row]:
    """Returns the rows of the fused head in float32, chunks that do not divide."""
    tallies = Tallies("losses")
    for seed in seeds:
        for scale in scales:
            hidden = random_hidden(seed, scale)
            plain = Case(
                "",
                hidden.student @ hidden.student_kernel,
                hidden.teacher @ hidden.teacher_kernel,
                hidden.mask,
                hidden.labels,
            )
            floor_scale = float(hidden.mask.sum()) ** 0.5
            for subject in subjects:
                followed = subject.as_published("float32", plain)
                loss = REFERENCE.loss if followed else exact_loss
                ours = our_gradients(subject, hidden)
                theirs = torch_gradients(subject, loss, hidden, torch.float32)
                exact = torch_gradients(subject, exact_loss, hidden, torch.float64)
                floor = gradient_floor(subject) * floor_scale
                other = REFERENCE.name if followed else other_side(subject)
                for quantity, field in QUANTITIES.items():
                    sides = [getattr(side, field) for side in (ours, theirs, exact)]
                    least = VALUE_FLOOR if field == "value" else floor
                    key = (f"{subject.name}, fused", quantity, other)
                    case = f"seed {seed}, scale {scale:g}"
                    tallies.add(key, TOLERANCE, case, *_errors(sides, least))
    return tallies.rows()
