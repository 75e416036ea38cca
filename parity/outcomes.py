"""What each side makes of a case, and how far apart two outcomes are."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.cases import Case
from parity.subjects import Subject, TorchLoss
from taid_jax.loss import Objective, distillation_loss

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
Reduce = Callable[..., jax.Array]


def rounded(case: Case, dtype: str) -> Case:
    """Returns a case whose float32 logits are what a format holds of them."""
    student, teacher = (
        torch.tensor(logits).to(TORCH_DTYPES[dtype]).float().numpy()
        for logits in (case.student, case.teacher)
    )
    return case._replace(student=student, teacher=teacher)


class Outcome(NamedTuple):
    """What one side made of a case: the mean loss, and the gradient of the sum."""

    value: float
    gradient: np.ndarray


def torch_outcome(
    subject: Subject, loss: TorchLoss, case: Case, dtype: str, total: bool = True
) -> Outcome:
    """Returns the PyTorch side of a case, computed on logits of `dtype`.

    The gradient is that of the sum over tokens if `total`, of the mean otherwise.
    """
    student = torch.tensor(case.student).to(TORCH_DTYPES[dtype]).requires_grad_()
    teacher = torch.tensor(case.teacher).to(TORCH_DTYPES[dtype])
    mask, labels = torch.tensor(case.mask), torch.tensor(case.labels).long()
    value = loss(subject.reference, student, teacher, mask, labels, subject.settings)
    scaled = value * max(float(mask.sum()), 1.0) if total else value
    (gradient,) = torch.autograd.grad(scaled, student)
    return Outcome(float(value.detach()), gradient.double().numpy())


@jax.jit(static_argnames="reduce")
def _value_and_gradient(
    objective: Objective,
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    labels: jax.Array,
    reduce: Reduce,
) -> tuple[jax.Array, jax.Array]:
    count = jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)

    def total(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = reduce(objective, logits, teacher, mask, labels)
        return value * count, value

    gradient, value = jax.grad(total, has_aux=True)(student)
    return value, gradient


def our_outcome(
    subject: Subject, case: Case, dtype: str, reduce: Reduce = distillation_loss
) -> Outcome:
    """Returns our side of a case, jitted, computed on logits of `dtype`."""
    value, gradient = _value_and_gradient(
        subject.make(),
        jnp.asarray(case.student).astype(dtype),
        jnp.asarray(case.teacher).astype(dtype),
        jnp.asarray(case.mask),
        jnp.asarray(case.labels),
        reduce,
    )
    return Outcome(float(value), np.asarray(gradient.astype(jnp.float32), np.float64))


def value_error(a: Outcome, b: Outcome, exact: Outcome, floor: float) -> float:
    """Returns the difference of two values over the exact one, or over `floor`."""
    return abs(a.value - b.value) / max(abs(exact.value), floor)


def gradient_error(
    a: Outcome, b: Outcome, exact: Outcome, floor: float, absolute: float = 0.0
) -> float:
    """Returns the norm of a gradient's difference over the norm of the exact gradient.

    That is taken for at least `floor` per token, and `absolute` is added to it: what
    the format cannot resolve, whatever its size.
    """
    difference = float(np.linalg.norm(a.gradient - b.gradient))
    if difference == 0.0:
        return 0.0
    tokens = np.abs(exact.gradient).max(-1) > 0
    floor *= float(np.sqrt(max(tokens.sum(), 1)))
    norm = float(np.linalg.norm(exact.gradient))
    return difference / (max(norm, floor) + absolute)
