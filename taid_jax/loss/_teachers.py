"""Several teachers of the same tokens, and the row of logits that their mean has."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from taid_jax.loss._topk import TopK, TopKHead
from taid_jax.types import Head


class Teachers(NamedTuple):
    """What several teachers say of the same tokens.

    Attributes:
        rows: Of each its hidden states, `(*tokens, d_model)` with a d_model of its own,
            or `TopK`.
        weights: `(*tokens, teachers)`, how much each counts, at least 0. A token may
            have one teacher alone: the others then contribute nothing, whatever they
            say.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import ForwardKL, Head, fused_loss
        >>> from taid_jax.loss import Teachers, TeachersHead
        >>> weights = jnp.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
        >>> teachers = Teachers((jnp.ones((3, 4)), jnp.ones((3, 6))), weights)
        >>> head = TeachersHead((Head(jnp.eye(4, 5)), Head(jnp.eye(6, 5))))
        >>> student = jnp.ones((3, 2)), Head(jnp.eye(2, 5))
        >>> total, sums = fused_loss(ForwardKL(), *student, teachers, head)
        >>> print(f"{total:.3f}")
        5.111
    """

    rows: tuple[Any, ...]
    weights: Float[Array, "*tokens teachers"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeachersHead:
    """Makes a row of logits of `Teachers`; stands where a teacher's `Head` would.

    With weights w and the teachers' distributions q the row is that of the arithmetic
    mean, `log(sum_i w_i q_i)`, or of the geometric one, `sum_i w_i log(q_i)`. The first
    finds probable what any teacher does, and is right for teachers of different fields;
    the second what all of them do. Each q is over the entries that all models share.

    Weights that do not add up to 1 do not change the arithmetic mean; the geometric one
    is sharper the more they add up to.

    Attributes:
        heads: Of the teachers, a `Head` each, or a `TopKHead` beside `TopK`.
        mean: Which one.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import Head, Teachers, TeachersHead
        >>> one, other = jnp.log(jnp.array([[[0.75, 0.25]], [[0.25, 0.75]]]))
        >>> rows = Teachers((one, other), jnp.array([[0.5, 0.5]]))
        >>> heads = (Head(jnp.eye(2)), Head(jnp.eye(2)))
        >>> row = TeachersHead(heads, "arithmetic").logits(rows, jnp.zeros((1, 2)))
        >>> print(jnp.exp(row).round(2))
        [[0.5 0.5]]
    """

    heads: tuple[Any, ...]
    mean: Literal["arithmetic", "geometric"] = dataclasses.field(
        default="arithmetic", metadata={"static": True}
    )

    @property
    def vocab_size(self) -> int:
        """Entries that all teachers have."""
        return min(
            head.kernel.shape[head.axes[1]]
            if head.vocab_size is None
            else head.vocab_size
            for head in self.heads
        )

    def logits(
        self, rows: Teachers, student_logits: Float[Array, "*tokens vocab"]
    ) -> Float[Array, "*tokens vocab"]:
        """Returns float32 logits of the mean.

        Args:
            rows: What the teachers say.
            student_logits: `(*tokens, vocab)`: as many entries take part, which all
                teachers have to have; and `TopK` may be filled up from them.
        """
        vocab = student_logits.shape[-1]
        made = [
            head.logits(each, student_logits)
            if isinstance(head, TopKHead)
            else head.logits(each)[..., :vocab]
            for each, head in zip(rows.rows, self.heads, strict=True)
        ]
        return self.mix(made, rows.weights)

    def mix(
        self,
        logits: Sequence[Float[Array, "*tokens vocab"]],
        weights: Float[Array, "*tokens teachers"],
    ) -> Float[Array, "*tokens vocab"]:
        """Returns float32 logits of the mean of rows of logits, one of each teacher."""
        weights = weights.astype(jnp.float32)
        # Padding has no teacher, and its row has to be finite.
        none = jnp.sum(weights, axis=-1, keepdims=True) == 0
        weights = jnp.where(none, 1 / len(logits), weights)
        mixed = None
        for number, row in enumerate(logits):
            weight = weights[..., number : number + 1]
            if self.mean == "geometric":
                row = jnp.where(weight > 0, weight * row, 0.0)
                mixed = row if mixed is None else mixed + row
            else:
                row = jnp.log(weight) + jax.nn.log_softmax(row, axis=-1)
                row = jnp.where(weight > 0, row, -jnp.inf)
                mixed = row if mixed is None else jnp.logaddexp(mixed, row)
        if mixed is None:
            raise ValueError("need at least one teacher, got none")
        return mixed

    def map_dense(
        self, function: Callable[[Any, Head], Head], out: "TeacherRows"
    ) -> "TeachersHead":
        """Returns every `Head` after a function of the teacher's rows and of it."""
        pairs = zip(out.rows, self.heads, strict=True)
        heads = (function(x, h) if isinstance(h, Head) else h for x, h in pairs)
        return dataclasses.replace(self, heads=tuple(heads))


TeacherOut = Array | TopK | Teachers | None
"""What comes of a teacher with every token."""

TeacherHead = Head | TopKHead | TeachersHead | None
"""What makes its rows of logits of that."""


class TeacherRows(NamedTuple):
    """What any number of teachers say of the same tokens.

    Attributes:
        rows: Of each its hidden states, their product with its head, or `TopK`.
        weights: As in `Teachers`; None where there is at most one teacher, whose row
            is taken as it is.
    """

    rows: tuple[Any, ...]
    weights: Float[Array, "*tokens teachers"] | None


def as_rows(out: TeacherOut, head: TeacherHead) -> tuple[TeacherRows, TeachersHead]:
    """Returns several teachers, one or none in the form of several."""
    if isinstance(out, Teachers) and isinstance(head, TeachersHead):
        return TeacherRows(*out), head
    if out is None:
        return TeacherRows((), None), TeachersHead(())
    return TeacherRows((out,), None), TeachersHead((head,))
