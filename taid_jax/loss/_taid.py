"""TAID: cross-entropy of the student to a teacher interpolated from the student."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Real, Shaped

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._cross_entropy import soft_cross_entropy
from taid_jax.loss._exact import Parts, exact
from taid_jax.loss._objective import (
    as_scalar,
    check_between,
    check_shapes,
    register_objective,
)
from taid_jax.loss._reduce import distillation_loss


class _Rows(NamedTuple):
    student: softmax.Row
    target: softmax.Row
    difference: Float[Array, "*tokens vocab"]
    gap: Float[Array, "*tokens 1"]


def _rows(student_logits: Array, teacher_logits: Array, t: Array) -> _Rows:
    student_top, teacher_top = map(
        softmax.checked, softmax.row_maxes(student_logits, teacher_logits)
    )
    q = softmax.normalise(student_logits, top=student_top)
    # Mixed after each is shifted to its largest, where the entries that matter are
    # small numbers: a float32 of 100 has an error of 4e-6, as much as its probability.
    mixture = (1 - t) * q.shifted + t * (softmax.finite(teacher_logits) - teacher_top)
    excluded = softmax.finite(student_logits) <= softmax.FLOOR
    mixture = jnp.where(excluded, softmax.FLOOR, mixture)
    anchor, mixture_top = softmax.row_maxes(
        softmax.at_top(student_logits, student_top, teacher_logits), mixture
    )
    # Where the teacher is silent there, its own largest logit stands in.
    anchor = jnp.where(anchor <= softmax.FLOOR, teacher_top, anchor)
    p = softmax.normalise(mixture, top=softmax.filled(mixture_top))
    difference = softmax.anchored_difference(
        student_logits, teacher_logits, student_top, anchor
    )
    gap = p.top + t * (teacher_top - anchor)
    return _Rows(q, p, t * difference, gap)


def _rule(student_logits: Array, teacher_logits: Array, t: Array) -> Parts:
    rows = _rows(student_logits, teacher_logits, t)
    return soft_cross_entropy(rows.student, rows.target, rows.difference, rows.gap)


@register_objective
@dataclasses.dataclass(frozen=True)
class TAID:
    """Cross-entropy to the interpolated teacher, in nats per token.

    The target is `softmax((1 - t) * student + t * teacher)` and carries no gradient.
    The gradient in the student's logits, `q - p_t`, is formed without subtracting two
    softmaxes that nearly agree, so it is exact also at small t and for a teacher close
    to the student.

    Attributes:
        t: Interpolation in [0, 1], scalar, a traced leaf without gradient; 0 is the
            student, 1 the teacher.

    Raises:
        TypeError: If `t` is no real number.
        ValueError: If `t` is outside [0, 1] or NaN; a traced one cannot be looked at.

    References:
        Shing et al., TAID, ICLR 2025 (arXiv:2501.16937), section 3.1.
    """

    t: ArrayLike

    def __post_init__(self) -> None:
        check_between("t", self.t, 0, 1)

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token; see `Objective`."""
        check_shapes(student_logits, teacher_logits, labels)
        return exact(
            _rule,
            student_logits.astype(jnp.float32),
            teacher_logits.astype(jnp.float32),
            as_scalar("t", self.t),
        )

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Returns `kl`, KL(p_t || student) of every token in nats; 0 at t = 0."""
        check_shapes(student_logits, teacher_logits, labels)
        q, p, difference, gap = _rows(
            student_logits.astype(jnp.float32),
            teacher_logits.astype(jnp.float32),
            as_scalar("t", self.t),
        )
        mean = softmax.row_sum(p.exp * difference) / p.total
        log_mass = gap + jnp.log(p.total / q.total)
        # Rounding can leave -1e-8 where the two agree.
        return {"kl": jnp.maximum(softmax.per_token(mean - log_mass), 0.0)}


def taid_loss(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "..."],
    mask: Shaped[Array, "..."] | None = None,
    *,
    t: Real[ArrayLike, ""],
) -> Float[Array, ""]:
    """Returns the mean cross-entropy to the interpolated teacher, in nats per token.

    Args:
        student_logits: Unnormalised log-probabilities, `(*tokens, vocab)`, any float
            dtype.
        teacher_logits: Same shape; receives no gradient.
        mask: `(*tokens,)`, bool or number; a token counts by its weight. All count when
            None.
        t: Interpolation in [0, 1], scalar, traced; 0 is the student, 1 the teacher.

    Returns:
        Scalar float32; 0 when no token counts.

    Raises:
        ValueError: If the shapes do not match, or `t` is outside [0, 1] and not traced.
        TypeError: If an argument is of the wrong kind.

    References:
        Shing et al., TAID, ICLR 2025 (arXiv:2501.16937), section 3.1.
    """
    return distillation_loss(TAID(t), student_logits, teacher_logits, mask)
