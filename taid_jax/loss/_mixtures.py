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

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._exact import Parts


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


def _teacher_share_above_top(
    pair: softmax.Pair, share: float | int
) -> Float[Array, "*tokens vocab"]:
    """Returns `v p / m` less the same at the student's largest entry.

    0 where a confident student has its mass, so that nothing is left to cancel there.
    """
    log_odds = math.log(share) - math.log1p(-share)
    x = pair.difference - pair.constant + log_odds
    top = pair.top_ratio + log_odds
    here, there = jax.nn.sigmoid(x), jax.nn.sigmoid(top)
    # Where the teacher is silent there, `difference` has another entry to start from.
    away = jnp.where(pair.top_ratio <= softmax.FLOOR, -softmax.FLOOR, pair.difference)
    near = jnp.abs(away) < softmax.NEAR
    step = there * jax.nn.sigmoid(-x) * softmax.expm1_near(away)
    return jnp.where(near, step, here - there)


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
        above = _teacher_share_above_top(pair, teacher_weight)
        return factor * q * (_mean(pair, above) - above)

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
