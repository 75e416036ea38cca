"""Divergences to a mixture of the two distributions: Jensen-Shannon and the skew KLs.

All three are functions of `x = log p - log q` and of the teacher's share v of the
mixture, `m = v p + (1 - v) q`, through two numbers of an entry:

    rho = log(q / m) = -log(1 - v + v exp(x))        tau = v p / m

A gradient is `q * (f - sum q f)` for an f made of these. A constant added to f changes
nothing in exact arithmetic and much in float32: f has to be near 0 where q has its
mass. Where student and teacher agree that is so for f(x) - f(0), and where the teacher
gives the student's likeliest entry next to nothing, for f(x) - f(-inf). Each token
takes the one that suits it.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from taid_jax.loss import softmax
from taid_jax.loss.exact import Parts


class _Terms(NamedTuple):
    rho: Float[Array, "*tokens vocab"]
    """`log(q / m)`, plus `offset`."""
    offset: Float[Array, "*tokens 1"]
    sigma: Float[Array, "*tokens vocab"]
    """`log(p / m)`."""
    tau: Float[Array, "*tokens vocab"]
    """`v p / m`, up to a constant of the token."""


def _terms(pair: softmax.Pair, share: float | int) -> _Terms:
    x = pair.difference - pair.constant
    far = pair.top_ratio < -1

    # In exp(-|x|) nothing overflows; for x > 0 the roles of q and p are exchanged.
    size = jnp.abs(x)
    decay = jnp.exp(-size)
    change = jnp.where(size < softmax.NEAR, softmax.expm1_near(-size), decay - 1)
    low = x <= 0
    part = jnp.where(low, share, 1 - share)
    deep = jnp.logical_and(far, x < -1)
    log_rest = math.log1p(-share)
    log_mixture = jnp.log1p(jnp.where(deep, share / (1 - share) * decay, part * change))
    offset = jnp.where(far, log_rest, 0.0)
    mixture = 1 + part * change
    centred = jnp.where(low, 1.0, -1.0) * (share * (1 - share)) * change
    return _Terms(
        rho=jnp.where(deep, 0.0, offset) - log_mixture - jnp.maximum(x, 0.0),
        offset=offset,
        sigma=jnp.minimum(x, 0.0) - log_mixture - jnp.where(deep, log_rest, 0.0),
        tau=jnp.where(far, share * jnp.where(low, decay, 1.0), centred) / mixture,
    )


def _mean(pair: softmax.Pair, values: Array) -> Float[Array, "*tokens 1"]:
    return softmax.row_sum(pair.student.exp * values) / pair.student.total


def jensen_shannon(pair: softmax.Pair, teacher_weight: float | int) -> Parts:
    """Returns `w KL(p, m) + (1 - w) KL(q, m)` for `m = w p + (1 - w) q`."""
    terms = _terms(pair, teacher_weight)
    student_weight = 1 - teacher_weight
    mean = _mean(pair, terms.rho)
    to_teacher = softmax.row_sum(pair.target.exp * terms.sigma) / pair.teacher.total
    value = student_weight * (mean - terms.offset) + teacher_weight * to_teacher

    def gradient() -> Float[Array, "*tokens vocab"]:
        q = pair.student.exp / pair.student.total
        return student_weight * q * (terms.rho - mean)

    return softmax.per_token(value), gradient


def skew_forward(pair: softmax.Pair, teacher_weight: float | int) -> Parts:
    """Returns `-sum p log m` for `m = w p + (1 - w) q`."""
    terms = _terms(pair, teacher_weight)
    p = pair.teacher
    surprise = terms.sigma - p.shifted
    mean = softmax.row_sum(pair.target.exp * surprise) / p.total
    value = mean + pair.kept * jnp.log(p.total)

    def gradient() -> Float[Array, "*tokens vocab"]:
        q = pair.student.exp / pair.student.total
        factor = (1 - teacher_weight) / teacher_weight
        return factor * q * (_mean(pair, terms.tau) - terms.tau)

    return softmax.per_token(value), gradient


def skew_reverse(pair: softmax.Pair, teacher_weight: float | int) -> Parts:
    """Returns `sum q (log q - log m)` for `m = (1 - w) p + w q`."""
    terms = _terms(pair, 1 - teacher_weight)
    value = _mean(pair, terms.rho) - terms.offset

    def gradient() -> Float[Array, "*tokens vocab"]:
        q = pair.student.exp / pair.student.total
        slope = terms.rho + terms.tau
        return q * (slope - _mean(pair, slope))

    return softmax.per_token(value), gradient
