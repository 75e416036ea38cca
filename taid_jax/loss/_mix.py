"""A distillation objective mixed with next-token cross-entropy."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from taid_jax.loss._cross_entropy import label_cross_entropy
from taid_jax.loss._objective import (
    STATIC,
    Objective,
    check_shapes,
    check_static,
    need_labels,
    register_objective,
)
from taid_jax.loss._reduce import token_metrics
from taid_jax.types import IGNORE_INDEX


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
        if self.distil_ratio == 1:
            return self.objective(student_logits, teacher_logits, labels)
        labels = need_labels("Mix", student_logits, labels)
        check_shapes(student_logits, teacher_logits, labels)
        lm_loss = label_cross_entropy(student_logits.astype(jnp.float32), labels)
        if self.distil_ratio == 0:
            return lm_loss
        distil_loss = self.objective(student_logits, teacher_logits, labels)
        mixed = (1 - self.distil_ratio) * lm_loss + self.distil_ratio * distil_loss
        return jnp.where(labels == IGNORE_INDEX, 0.0, mixed)

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Returns `distil_loss`, `lm_loss` and the objective's metrics, per token."""
        check_shapes(student_logits, teacher_logits, labels)
        if labels is not None:
            labels = need_labels("Mix", student_logits, labels)
        metrics = token_metrics(self.objective, student_logits, teacher_logits, labels)
        metrics["distil_loss"] = self.objective(student_logits, teacher_logits, labels)
        if labels is not None:
            metrics["lm_loss"] = label_cross_entropy(
                student_logits.astype(jnp.float32), labels
            )
        return metrics
