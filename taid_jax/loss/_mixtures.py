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

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._divergences import Divergence
from taid_jax.loss._objective import Parts, bounded, register_objective

Share = float | int | Float[Array, "... 1"]
"""Of a mixture; strictly between 0 and 1, without gradient; of each token or all."""


class _Terms(NamedTuple):
    rho: Float[Array, "*tokens vocab"]
    """`log(q / m)`, plus `constant`."""
    constant: Float[Array, "*tokens 1"]
    sigma: Float[Array, "*tokens vocab"]
    """`log(p / m)`."""
    tau: Float[Array, "*tokens vocab"]
    """`v p / m`, up to a constant of the token."""


def _logs(share: Share) -> tuple[Any, Any]:
    """Returns the logarithms of a share and of the rest."""
    if isinstance(share, Array):
        return jnp.log(share), jnp.log1p(-share)
    return math.log(share), math.log1p(-share)


def _terms(pair: softmax.Pair, share: Share) -> _Terms:
    x = pair.difference - pair.constant
    far = pair.top_ratio < -1

    # In exp(-|x|) nothing overflows; for x > 0 the roles of q and p are exchanged.
    size = jnp.abs(x)
    decay = jnp.exp(-size)
    growth = jnp.where(size < softmax.NEAR, softmax.expm1_near(-size), decay - 1)
    low = x <= 0
    part = jnp.where(low, share, 1 - share)
    deep = jnp.logical_and(far, x < -1)
    _, log_rest = _logs(share)
    log_mixture = jnp.log1p(jnp.where(deep, share / (1 - share) * decay, part * growth))
    constant = jnp.where(far, log_rest, 0.0)
    mixture = 1 + part * growth
    centred = jnp.where(low, 1.0, -1.0) * (share * (1 - share)) * growth
    return _Terms(
        rho=jnp.where(deep, 0.0, constant) - log_mixture - jnp.maximum(x, 0.0),
        constant=constant,
        sigma=jnp.minimum(x, 0.0) - log_mixture - jnp.where(deep, log_rest, 0.0),
        tau=jnp.where(far, share * jnp.where(low, decay, 1.0), centred) / mixture,
    )


def _teacher_share_above_top(
    pair: softmax.Pair, share: Share
) -> Float[Array, "*tokens vocab"]:
    """Returns `v p / m` less the same at the student's largest entry.

    0 where a confident student has its mass, so that nothing is left to cancel there.
    """
    log_share, log_rest = _logs(share)
    log_odds = log_share - log_rest
    x = pair.difference - pair.constant + log_odds
    top = pair.top_ratio + log_odds
    here, there = jax.nn.sigmoid(x), jax.nn.sigmoid(top)
    # Where the teacher is masked there, `difference` has another entry to start from.
    away = jnp.where(pair.top_ratio <= softmax.FLOOR, -softmax.FLOOR, pair.difference)
    near = jnp.abs(away) < softmax.NEAR
    step = there * jax.nn.sigmoid(-x) * softmax.expm1_near(away)
    return jnp.where(near, step, here - there)


def _mean(pair: softmax.Pair, values: Array) -> Float[Array, "*tokens 1"]:
    return softmax.row_sum(pair.student.exp * values) / pair.student.total


@register_objective
@dataclasses.dataclass(frozen=True)
class JensenShannon(Divergence):
    """`w KL(p, m) + (1 - w) KL(q, m)` for the mixture `m = w p + (1 - w) q`.

    Attributes:
        teacher_weight: w, strictly between 0 and 1; static.
        temperature: As in `ForwardKL`.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Agarwal et al., GKD, arXiv:2306.13649.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import JensenShannon
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> print(f"{JensenShannon(teacher_weight=0.1)(student, teacher):.3f}")
        0.097
    """

    teacher_weight: float | int = bounded(1e-6, 1 - 1e-6, default=0.1)
    temperature: ArrayLike = 1.0

    def _divergence(self, pair: softmax.Pair) -> Parts:
        weight = self.teacher_weight
        terms = _terms(pair, weight)
        mean = _mean(pair, terms.rho)
        to_teacher = softmax.row_sum(pair.target.exp * terms.sigma) / pair.teacher.total
        value = (1 - weight) * (mean - terms.constant) + weight * to_teacher

        def gradient() -> Float[Array, "*tokens vocab"]:
            q = pair.student.exp / pair.student.total
            return (1 - weight) * q * (terms.rho - mean)

        return softmax.per_token(value), gradient


def skew_forward(pair: softmax.Pair, skew: Share) -> Parts:
    """Returns `-sum p log m` for `m = skew p + (1 - skew) q`, in its parts."""
    terms = _terms(pair, skew)
    p = pair.teacher
    surprise = terms.sigma - p.shifted
    mean = softmax.row_sum(pair.target.exp * surprise) / p.total
    value = mean + pair.mass * jnp.log(p.total)

    def gradient() -> Float[Array, "*tokens vocab"]:
        q = pair.student.exp / pair.student.total
        above = _teacher_share_above_top(pair, skew)
        return (1 - skew) / skew * q * (_mean(pair, above) - above)

    return softmax.per_token(value), gradient


def skew_reverse(pair: softmax.Pair, skew: Share) -> Parts:
    """Returns `sum q (log q - log m)` for `m = (1 - skew) p + skew q`, in its parts."""
    terms = _terms(pair, 1 - skew)
    value = _mean(pair, terms.rho) - terms.constant

    def gradient() -> Float[Array, "*tokens vocab"]:
        q = pair.student.exp / pair.student.total
        slope = terms.rho + terms.tau
        return q * (slope - _mean(pair, slope))

    return softmax.per_token(value), gradient


@register_objective
@dataclasses.dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """`-sum p log m` for `m = skew p + (1 - skew) q`, without the teacher's entropy.

    It is KL(p || m) less the entropy of p, which has no gradient.

    Attributes:
        skew: The teacher's share of the mixture, strictly between 0 and 1; static.
        temperature: As in `ForwardKL`.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Ko et al., DistiLLM, arXiv:2402.03898.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import SkewForwardKL
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> print(f"{SkewForwardKL(skew=0.1)(student, teacher):.3f}")
        1.662
    """

    skew: float | int = bounded(1e-6, 1 - 1e-6, default=0.1)
    temperature: ArrayLike = 1.0

    def _divergence(self, pair: softmax.Pair) -> Parts:
        return skew_forward(pair, self.skew)


@register_objective
@dataclasses.dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q || m), `sum q (log q - log m)`, for `m = (1 - skew) p + skew q`.

    Attributes:
        skew: The student's share of the mixture, strictly between 0 and 1; static.
        temperature: As in `ForwardKL`.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Ko et al., DistiLLM, arXiv:2402.03898.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import SkewReverseKL
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> print(f"{SkewReverseKL(skew=0.1)(student, teacher):.3f}")
        0.830
    """

    skew: float | int = bounded(1e-6, 1 - 1e-6, default=0.1)
    temperature: ArrayLike = 1.0

    def _divergence(self, pair: softmax.Pair) -> Parts:
        return skew_reverse(pair, self.skew)
