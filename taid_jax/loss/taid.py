"""TAID: cross-entropy of the student to a teacher interpolated from the student."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Real, Shaped

from taid_jax.loss import softmax
from taid_jax.loss.objective import check_setting, check_shapes, register_objective
from taid_jax.loss.reduce import distillation_loss


class _Rows(NamedTuple):
    student: softmax.Normalised
    target: softmax.Normalised
    difference: Float[Array, "*tokens vocab"]
    log_mass: Float[Array, "*tokens 1"]


def _rows(
    student: Float[Array, "*tokens vocab"],
    teacher: Float[Array, "*tokens vocab"],
    t: Float[Array, ""],
) -> _Rows:
    student, teacher = softmax.finite(student), softmax.finite(teacher)
    mixture = jnp.where(
        softmax.excluded(student), softmax.FLOOR, (1 - t) * student + t * teacher
    )
    q, p = softmax.normalise(student), softmax.normalise(mixture)
    offset = softmax.row_max(teacher) - q.top
    difference = t * ((teacher - student) - offset)
    log_mass = softmax.log_mass_ratio(q, p, difference, t * offset)
    return _Rows(q, p, difference, log_mass)


def _value(rows: _Rows) -> Float[Array, "*tokens"]:
    q, p = rows.student, rows.target
    loss = jnp.log(q.total) - softmax.row_sum(p.exp * q.shifted) / p.total
    return jnp.squeeze(loss, -1)


@jax.custom_jvp
def _cross_entropy(
    student: Float[Array, "*tokens vocab"],
    teacher: Float[Array, "*tokens vocab"],
    t: Float[Array, ""],
) -> Float[Array, "*tokens"]:
    return _value(_rows(student, teacher, t))


@_cross_entropy.defjvp
def _cross_entropy_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    rows = _rows(*primals)
    gradient = softmax.softmax_difference(
        rows.student, rows.target, rows.difference - rows.log_mass
    )
    return _value(rows), jnp.sum(gradient * tangents[0], axis=-1)


@register_objective
@dataclasses.dataclass(frozen=True)
class TAID:
    """Cross-entropy to the interpolated teacher, in nats per token.

    The target is `softmax((1 - t) * student + t * teacher)` and carries no gradient.
    The gradient in the student's logits, `q - p_t`, is formed from
    `q * expm1(log p_t - log q)` and stays exact where the two nearly agree: at small t
    and for a teacher close to the student. A difference of two softmaxes does not.

    Attributes:
        t: Interpolation in [0, 1], scalar, a traced leaf without gradient; 0 is the
            student, 1 the teacher.

    Raises:
        ValueError: If `t` is a Python number outside [0, 1].

    References:
        Shing et al., TAID, ICLR 2025 (arXiv:2501.16937), section 3.1.
    """

    t: ArrayLike

    def __post_init__(self) -> None:
        check_setting("t", self.t, 0.0, 1.0)

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token; see `Objective`."""
        check_shapes(student_logits, teacher_logits, labels)
        return _cross_entropy(
            student_logits.astype(jnp.float32),
            teacher_logits.astype(jnp.float32),
            jnp.asarray(self.t, jnp.float32),
        )

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Returns `kl`, KL(p_t || student) of every token in nats; 0 at t = 0."""
        del labels
        rows = _rows(
            student_logits.astype(jnp.float32),
            teacher_logits.astype(jnp.float32),
            jnp.asarray(self.t, jnp.float32),
        )
        mean = softmax.row_sum(rows.target.exp * rows.difference) / rows.target.total
        return {"kl": jnp.maximum(jnp.squeeze(mean - rows.log_mass, -1), 0.0)}


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
        ValueError: If the shapes do not match.

    References:
        Shing et al., TAID, ICLR 2025 (arXiv:2501.16937), section 3.1.
    """
    return distillation_loss(TAID(t), student_logits, teacher_logits, mask)
