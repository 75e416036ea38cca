"""Softmaxes of two rows of logits, and the exact difference between them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

FLOOR = -1e30
"""Stands for -inf: its exponential is 0, and sums and products of it stay finite."""


class Normalised(NamedTuple):
    """A row of logits in the parts of its softmax.

    Attributes:
        shifted: `(*tokens, vocab)`, logits minus their largest.
        exp: `(*tokens, vocab)`, `exp(shifted)`.
        top: `(*tokens, 1)`, the largest logit.
        total: `(*tokens, 1)`, the sum of `exp`.
    """

    shifted: Float[Array, "*tokens vocab"]
    exp: Float[Array, "*tokens vocab"]
    top: Float[Array, "*tokens 1"]
    total: Float[Array, "*tokens 1"]


def finite(logits: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens vocab"]:
    """Returns float32 logits with `FLOOR` in place of -inf; NaN and inf stay."""
    return jnp.maximum(logits.astype(jnp.float32), FLOOR)


def row_sum(values: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens 1"]:
    """Returns the sum over the vocabulary."""
    return jnp.sum(values, axis=-1, keepdims=True)


def row_max(values: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens 1"]:
    """Returns the largest entry over the vocabulary."""
    return jnp.max(values, axis=-1, keepdims=True)


def normalise(logits: Float[Array, "*tokens vocab"]) -> Normalised:
    """Returns the parts of the softmax of finite logits."""
    top = row_max(logits)
    shifted = logits - top
    exp = jnp.exp(shifted)
    return Normalised(shifted, exp, top, row_sum(exp))


def excluded(logits: Float[Array, "*tokens vocab"]) -> Bool[Array, "*tokens vocab"]:
    """Returns where finite logits stand for -inf."""
    return logits <= FLOOR


def centred_difference(
    student: Float[Array, "*tokens vocab"],
    target: Float[Array, "*tokens vocab"],
) -> Float[Array, "*tokens vocab"]:
    """Returns target minus student logits, less the difference of their largest.

    A constant over the vocabulary means nothing to a softmax; taken off here, it cannot
    drown small differences in rounding later. No entry of student + result is above
    the student's largest logit.
    """
    return (target - student) - (row_max(target) - row_max(student))


def log_mass_ratio(
    student: Normalised,
    target: Normalised,
    difference: Float[Array, "*tokens vocab"],
    offset: Float[Array, "*tokens 1"],
) -> Float[Array, "*tokens 1"]:
    """Returns `log sum_v q_v exp(difference_v)`, q the student's softmax.

    Args:
        student: The student's row.
        target: The row of logits `student + difference + offset`.
        difference: Logits of the target minus the student's, up to `offset`.
        offset: A constant over the vocabulary.
    """
    # exp(difference) - 1 times the student's exponential, without overflow and without
    # cancellation, whichever of the two is the larger.
    gap = target.top - offset - student.top
    larger = jnp.where(difference <= 0, student.exp, target.exp * jnp.exp(gap))
    change = jnp.sign(difference) * larger * -jnp.expm1(-jnp.abs(difference))
    relative = row_sum(change) / student.total
    # Close to -1 the sum has lost its digits, but there the logarithms have not.
    near = relative > -0.5
    return jnp.where(
        near,
        jnp.log1p(jnp.where(near, relative, 0.0)),
        gap + jnp.log(target.total / student.total),
    )


def softmax_difference(
    student: Normalised,
    target: Normalised,
    log_ratio: Float[Array, "*tokens vocab"],
) -> Float[Array, "*tokens vocab"]:
    """Returns q - p, exact also where the two are nearly equal.

    Args:
        student: The row of q.
        target: The row of p.
        log_ratio: `log p - log q`.
    """
    q = student.exp / student.total
    p = target.exp / target.total
    return jnp.where(log_ratio <= 0, -q, p) * jnp.expm1(-jnp.abs(log_ratio))
