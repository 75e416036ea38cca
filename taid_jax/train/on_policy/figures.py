"""What is measured of texts that a model wrote, beside the objective."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from taid_jax import loss
from taid_jax.loss import _softmax as softmax
from taid_jax.loss._checks import need_labels
from taid_jax.loss._objective import register_objective
from taid_jax.loss._reduce import token_metrics
from taid_jax.train.objective import MakeObjective, Objective, both_sides


@register_objective
@dataclasses.dataclass(frozen=True)
class WithTextFigures:
    """An objective that also tells how sure the student is and what both think of it.

    Its metrics are those of the objective and, in nats per token: `student_entropy`;
    `student_nll` and `teacher_nll`, the cross-entropies of both models to the text;
    `kl_reverse`, KL(student || teacher).

    Attributes:
        objective: Gives the loss.
    """

    objective: Objective

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "*tokens vocab"],
        labels: Int[Array, "*tokens"] | None = None,
    ) -> Float32[Array, "*tokens"]:
        """Returns the loss of every token; see `Objective`."""
        return self.objective(student_logits, teacher_logits, labels)

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "*tokens vocab"],
        labels: Int[Array, "*tokens"] | None = None,
    ) -> dict[str, Float32[Array, "*tokens"]]:
        """Returns the objective's metrics and the others, `(*tokens,)` each."""
        labels = need_labels("WithTextFigures", student_logits, labels)
        q = softmax.normalise(student_logits.astype(jnp.float32))
        surprise = softmax.row_sum(q.exp * q.shifted) / q.total
        return {
            **token_metrics(self.objective, student_logits, teacher_logits, labels),
            "student_entropy": softmax.per_token(jnp.log(q.total) - surprise),
            **both_sides(student_logits, teacher_logits, labels),
        }


def with_text_figures(make: MakeObjective) -> MakeObjective:
    """Returns what makes the objectives of steps, with the figures of their texts."""

    def wrapped(*about: Any) -> Objective | loss.ByText:
        objective = make(*about)
        if not isinstance(objective, loss.ByText):
            return WithTextFigures(objective)
        return dataclasses.replace(
            objective,
            teacher_texts=WithTextFigures(objective.teacher_texts),
            student_texts=WithTextFigures(objective.student_texts),
        )

    return wrapped
