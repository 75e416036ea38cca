"""Concrete score distillation: differences of logits between all pairs of entries."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from taid_jax.errors import show
from taid_jax.loss import _softmax as softmax
from taid_jax.loss._divergences import Divergence
from taid_jax.loss._objective import STATIC, Parts, register_objective


@register_objective
@dataclasses.dataclass(frozen=True)
class ConcreteScore(Divergence):
    """How differently student and teacher rank each pair of entries, squared.

        sum_ij w_i w_j ((s_i - s_j) - (u_i - u_j))^2

    in linear time, as twice the variance of s - u under the weights w, which carry no
    gradient. A constant added to either side's logits changes nothing. With the
    student's weights the gradient is four times that of `ReverseKL`; with the teacher's
    it also reaches entries that the student has given up.

    Entries that either side excludes are left out of both sums.

    Attributes:
        weights: `student` weighs by q and seeks modes, `teacher` by p and covers them;
            static.
        temperature: Of the weights' softmax alone, as the loss is multiplied by its
            square. A traced leaf without gradient.

    Raises:
        ValueError: If a setting is none of these or out of its range.

    References:
        Kim et al., Distillation of Large Language Models via Concrete Score Matching,
        ICLR 2026 (arXiv:2509.25837). Its code leaves out a factor of 4.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import ConcreteScore
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> print(f"{ConcreteScore()(student, teacher):.3f}")
        3.395
    """

    weights: Literal["student", "teacher"] = dataclasses.field(
        default="student", metadata=STATIC
    )
    temperature: ArrayLike = 1.0

    def __post_init__(self) -> None:
        if self.weights not in ("student", "teacher"):
            raise ValueError(
                f"need student or teacher for weights, got {show(self.weights)}"
            )
        super().__post_init__()

    def _value_and_gradient(
        self, student_logits: Array, teacher_logits: Any, labels: Any
    ) -> Parts:
        # The difference starts from the likeliest entry of the row that weighs.
        if self.weights == "student":
            return super()._value_and_gradient(student_logits, teacher_logits, labels)
        value, gradient = super()._value_and_gradient(
            teacher_logits, student_logits, labels
        )
        return value, lambda: -gradient()

    def _divergence(self, pair: softmax.Pair) -> Parts:
        left_out = pair.student_masked | pair.teacher_masked
        w = jnp.where(left_out, 0.0, pair.student.exp) / pair.student.total
        # NaN if either row is none, also where nothing is left.
        mass = softmax.row_sum(w) + 0.0 * pair.constant
        difference = jnp.where(left_out, 0.0, pair.difference)
        mean = softmax.row_sum(w * difference) / jnp.where(mass == 0, 1.0, mass)
        centred = difference - mean
        value = 2 * mass * softmax.row_sum(w * centred**2)

        def gradient() -> Float[Array, "*tokens vocab"]:
            return -4 * mass * w * centred

        return softmax.per_token(value), gradient
