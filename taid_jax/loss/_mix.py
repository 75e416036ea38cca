"""Next-token cross-entropy, and a distillation objective mixed with it."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._checks import check_shapes, check_static, need_labels
from taid_jax.loss._objective import (
    STATIC,
    ExactObjective,
    Objective,
    Parts,
    label_entries,
    register_objective,
)
from taid_jax.loss._reduce import token_metrics
from taid_jax.types import IGNORE_INDEX


@register_objective
@dataclasses.dataclass(frozen=True)
class CrossEntropy(ExactObjective):
    """Next-token cross-entropy to the labels, `-log q` of each, in nats per token.

    It ignores the teacher, whose logits may be None.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import CrossEntropy
        >>> student, labels = jnp.zeros((2, 4)), jnp.array([3, -100])
        >>> print([f"{x:.3f}" for x in CrossEntropy()(student, None, labels)])
        ['1.386', '0.000']
    """

    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def _value_and_gradient(
        self, student_logits: Array, teacher_logits: Any, labels: Any
    ) -> Parts:
        q = softmax.normalise(student_logits)
        is_label = label_entries(labels, student_logits.shape[-1])
        shifted = softmax.row_sum(jnp.where(is_label, q.shifted, 0.0))
        # A label that is -inf in the student takes no part; NaN is not hidden.
        masked = shifted <= softmax.FLOOR / 2
        value = softmax.per_token(jnp.where(masked, 0.0, jnp.log(q.total) - shifted))

        def gradient() -> Float[Array, "*tokens vocab"]:
            # 1 - q of the label from the other entries: exact also where q is nearly 1.
            others = softmax.row_sum(jnp.where(is_label, 0.0, q.exp))
            in_logits = jnp.where(is_label, -others, q.exp) / q.total
            return jnp.where(masked, 0.0, in_logits)

        return value, gradient


@register_objective
@dataclasses.dataclass(frozen=True)
class Mix:
    """`(1 - distil_ratio) * cross-entropy to the labels + distil_ratio * objective`.

    Both come out of one pass over the logits. Its metrics are `distil_loss`, the
    objective's own loss, `lm_loss`, the cross-entropy, and those of the objective.

    Attributes:
        objective: What is mixed in.
        distil_ratio: Its share, in [0, 1]; static. At 1 labels are not needed, and
            `lm_loss` is reported when they are there.

    Raises:
        ValueError: If the ratio is out of its range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import ForwardKL, Mix
        >>> student, teacher = jnp.zeros((1, 4)), jnp.array([[2.0, 1.0, 0.0, 0.0]])
        >>> (loss,) = Mix(ForwardKL(), 0.5)(student, teacher, jnp.array([0]))
        >>> print(f"{loss:.3f}")
        1.386
    """

    objective: Objective
    distil_ratio: float | int = dataclasses.field(metadata=STATIC)

    def __post_init__(self) -> None:
        check_static("distil_ratio", self.distil_ratio, 0, 1)

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token; see `Objective`."""
        if labels is not None or self.distil_ratio < 1:
            labels = need_labels("Mix", student_logits, labels)
        check_shapes(student_logits, teacher_logits, labels)
        losses = jnp.float32(0)
        if self.distil_ratio < 1:
            lm_loss = CrossEntropy()(student_logits, None, labels)
            losses += (1 - self.distil_ratio) * lm_loss
        if self.distil_ratio > 0:
            distil_loss = self.objective(student_logits, teacher_logits, labels)
            losses += self.distil_ratio * distil_loss
        if labels is None:
            return losses
        return jnp.where(labels == IGNORE_INDEX, 0.0, losses)

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Returns `distil_loss`, `lm_loss` and the objective's metrics, per token."""
        check_shapes(student_logits, teacher_logits, labels)
        metrics = token_metrics(self.objective, student_logits, teacher_logits, labels)
        metrics["distil_loss"] = self.objective(student_logits, teacher_logits, labels)
        if labels is not None:
            metrics["lm_loss"] = CrossEntropy()(student_logits, None, labels)
        return metrics
