"""DKD: forward KL split at the label, its two parts with weights of their own."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._checks import check_positive
from taid_jax.loss._divergences import forward
from taid_jax.loss._objective import (
    ExactObjective,
    Parts,
    bounded,
    label_entries,
    register_objective,
)


@register_objective
@dataclasses.dataclass(frozen=True)
class DKD(ExactObjective):
    """Forward KL split at the label: `alpha TCKD + beta NCKD`, times `temperature^2`.

    TCKD is the KL of (label, everything else) and NCKD the KL among everything else,
    each with its own weight instead of the teacher's confidence.

    Attributes:
        alpha: Weight of TCKD, at least 0; static.
        beta: Weight of NCKD, at least 0; static.
        temperature: Divides both rows of logits; a traced leaf without gradient.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Zhao et al., Decoupled Knowledge Distillation, arXiv:2203.08679.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import DKD
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> print(f"{DKD(alpha=1.0, beta=0.5)(student, teacher, jnp.array(2)):.3f}")
        1.227
    """

    alpha: float | int = bounded(0, 1e6, default=1.0)
    beta: float | int = bounded(0, 1e6, default=0.5)
    temperature: ArrayLike = 1.0

    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)

    def _value_and_gradient(
        self, student_logits: Array, teacher_logits: Any, labels: Any
    ) -> Parts:
        alpha, beta = self.alpha, self.beta
        temperature = jnp.asarray(self.temperature, jnp.float32)
        is_label = label_entries(labels, student_logits.shape[-1])
        rest = softmax.normalise_pair(
            jnp.where(is_label, -jnp.inf, student_logits),
            jnp.where(is_label, -jnp.inf, teacher_logits),
            temperature,
            softmax.filled,
        )
        label = softmax.normalise_pair(
            softmax.row_max(jnp.where(is_label, student_logits, -jnp.inf)),
            softmax.row_max(jnp.where(is_label, teacher_logits, -jnp.inf)),
            temperature,
            softmax.filled,
        )
        binary = _label_and_rest(label, rest, temperature)
        value = temperature**2 * (alpha * softmax.kl(binary) + beta * softmax.kl(rest))

        def gradient() -> Float[Array, "*tokens vocab"]:
            _, in_binary = forward(binary)
            _, in_rest = forward(rest)
            at_label, at_rest = jnp.split(alpha * in_binary(), 2, axis=-1)
            q = rest.student.exp / rest.student.total
            in_logits = jnp.where(is_label, at_label, at_rest * q + beta * in_rest())
            return temperature * in_logits

        return value, gradient


def _label_and_rest(
    label: softmax.Pair, rest: softmax.Pair, temperature: Array
) -> softmax.Pair:
    """Returns the softmaxes of two entries: the label, and all others as one."""

    def logits(label: softmax.Row, rest: softmax.Row) -> Float[Array, "*tokens 2"]:
        parts = [
            jnp.where(
                softmax.row_max(row.exp) == 0,
                softmax.FLOOR,
                row.top / temperature + jnp.log(row.total),
            )
            for row in (label, rest)
        ]
        return jnp.concatenate(parts, axis=-1)

    student = logits(label.student, rest.student)
    binary = softmax.normalise_pair(student, logits(label.teacher, rest.teacher))
    # Where student and teacher nearly agree, two rounded logarithms leave few digits of
    # their difference; how much the label rises against the rest is known better.
    rise = (label.shift - rest.shift) / temperature - softmax.exact_constant(rest)
    zero = jnp.zeros_like(rise)
    label_logit, rest_logit = jnp.split(student, 2, axis=-1)
    difference = jnp.where(
        label_logit >= rest_logit,
        jnp.concatenate([zero, -rise], axis=-1),
        jnp.concatenate([rise, zero], axis=-1),
    )
    missing = jnp.logical_or(label.student_masked, label.teacher_masked)
    known = jnp.logical_and(jnp.abs(rise) < softmax.NEAR, jnp.logical_not(missing))
    return binary._replace(difference=jnp.where(known, difference, binary.difference))
