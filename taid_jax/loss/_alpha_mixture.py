"""AMiD: cross-entropy to a power mean of the student's and the teacher's distribution.

With c = (1 - shape) / 2 and x = log p - log q, the mixture is `q exp(g(x))` over its
sum, where

    g(x) = log(1 - t + t exp(c x)) / c

It is needed in two forms. Its exponential has to be right wherever the mixture has
mass, and is taken from the larger of the two terms. Its difference from the student has
to be right where it is small, and starts from the student's largest entry:
`g(x) - g(x_0) = log1p(s expm1(c (x - x_0))) / c` for the share s that the teacher has
there.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._objective import bounded, register_objective
from taid_jax.loss._taid import Interpolated, interpolate, with_target

LARGEST_SHAPE = 9.0
"""Of either sign. The power c is at most 5 then: `exp(c x)` has digits in float32."""

_FAR = 1e20
"""Beyond every exponent, and small beside `softmax.FLOOR`."""

_CAP = 80.0
"""Its exponential is near float32's largest number."""


def _log_mean(
    share: Array, log_share: Array, log_rest: Array, y: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Returns `log(1 - share + share exp(y))`, small where y is small."""
    near = jnp.abs(y) < softmax.NEAR
    small = jnp.log1p(share * softmax.expm1_near(y))
    return jnp.where(near, small, jnp.logaddexp(log_rest, log_share + y))


def _log_mixture(
    pair: softmax.Pair, t: Array, logs: tuple[Array, Array], c: float
) -> Float[Array, "*tokens vocab"]:
    """Returns `log q + g(x)`, up to the logarithm of the student's total."""
    log_t, log_rest = logs
    q, p = pair.student, pair.teacher
    log_q, log_p = q.shifted, p.shifted + jnp.log(q.total / p.total)
    x = log_p - log_q
    # What is added to the one of the two that matters is bounded there.
    from_student = x <= 0 if c > 0 else x > 0
    y = jnp.maximum(-abs(c) * jnp.abs(x), -_FAR)
    mean = _log_mean(
        jnp.where(from_student, t, 1 - t),
        jnp.where(from_student, log_t, log_rest),
        jnp.where(from_student, log_rest, log_t),
        y,
    )
    mixture = jnp.where(from_student, log_q, log_p) + mean / c
    # At t = 0 a masked teacher has no say, and a NaN has.
    mixture = jnp.where((t == 0) & ~jnp.isnan(x), log_q, mixture)
    return jnp.where(pair.student_masked, softmax.FLOOR, mixture)


def _mix(pair: softmax.Pair, t: Array, c: float) -> softmax.Pair:
    """Returns the pair of the student and the mixture of power c, which is not 0."""
    # The slope of a logarithm at 0 is infinite, and times nothing NaN.
    t = jax.lax.stop_gradient(t)
    log_t = jnp.maximum(jnp.log(t), softmax.FLOOR)
    log_rest = jnp.maximum(jnp.log1p(-t), softmax.FLOOR)
    mixture = _log_mixture(pair, t, (log_t, log_rest), c)
    start = -pair.constant
    log_start = _log_mean(t, log_t, log_rest, c * start)
    log_share = log_t + c * start - log_start
    share = jnp.exp(log_share)
    y = jnp.clip(c * pair.difference, -_FAR, _FAR)
    grown = jnp.exp(jnp.minimum(log_share + y, _CAP)) - share
    grown = jnp.where(jnp.abs(y) < softmax.NEAR, share * softmax.expm1_near(y), grown)
    # What is left out here is far from small: its logarithm is to stay finite.
    near = jnp.log1p(jnp.maximum(grown, -0.999)) / c
    far = mixture - pair.student.shifted - log_start / c
    difference = jnp.where(jnp.abs(near) < 2 * softmax.NEAR, near, far)
    return with_target(pair, mixture, difference, -log_start / c)


@register_objective
@dataclasses.dataclass(frozen=True)
class AlphaMixture(Interpolated):
    """Cross-entropy to a power mean of student and teacher, in nats per token.

    The target carries no gradient. With `c = (1 - shape) / 2` it is

        r = (t p^c + (1 - t) q^c)^(1 / c)  over its sum,

    over the entries that the student has. Shape 1 is the limit of c = 0, a geometric
    mean, and TAID to the last digit; shape -1 is the arithmetic mixture `t p + (1 - t)
    q`. At t = 0 it is the student, at t = 1 the teacher, whatever the shape. A shape
    below 1 gives mass to what either side finds probable, one above 1 only to what both
    do. The gradient in the student's logits, `q - r`, is as exact as TAID's.

    Attributes:
        t: The teacher's share in [0, 1], scalar, a traced leaf without gradient; the
            paper's lambda, and what TAID's schedule drives.
        shape: The paper's alpha, from -9 to 9; static.

    Its metrics are `kl_teacher` and `kl_target`, KL(r || student), which is 0 at t = 0.

    Raises:
        TypeError: If a setting is no real number, or `shape` is traced.
        ValueError: If one is out of its range or NaN; a traced `t` cannot be looked at.

    References:
        Shin et al., AMiD, ICLR 2026 (arXiv:2510.15982).

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import TAID, AlphaMixture
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 0.0, 2.0])
        >>> losses = [AlphaMixture(0.2, a)(student, teacher) for a in (-1, 0, 1)]
        >>> print([f"{loss:.3f}" for loss in losses])
        ['1.084', '1.030', '1.008']
        >>> bool(losses[2] == TAID(0.2)(student, teacher))
        True
    """

    t: ArrayLike
    shape: float | int = bounded(-LARGEST_SHAPE, LARGEST_SHAPE)

    def _interpolate(self, pair: softmax.Pair, t: Array) -> softmax.Pair:
        c = (1 - float(self.shape)) / 2
        return interpolate(pair, t) if c == 0 else _mix(pair, t, c)
