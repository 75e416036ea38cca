"""ABKD: the alpha-beta divergence, of which both KLs are limits.

With s = a + b and x = log p - log q the divergence of an entry is

    (p^a q^b expm1(b x) / b - q^s expm1(a x) / a) / s

in which neither a nor b is divided by, and its slope in q is `-q^(s - 1) A(x)` for
`A(x) = expm1(a x) / a`. A constant F added to all slopes changes no gradient `q (slope
- sum q slope)` and much in float32: here it is what leaves 0 at the student's largest
entry, where a confident student has its mass.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._checks import check_static
from taid_jax.loss._divergences import Divergence
from taid_jax.loss._objective import Parts, bounded, register_objective

LARGEST_POWER = 4.0
"""Of a and of b: powers of the likeliest entries stay within float32."""

LEAST_SUM = 1e-2
"""Of a and b: with a power of 0 every entry would count as much as any other."""

_LIMIT = 1e-9
"""For a power below this, `expm1(power * x) / power` is x to float32's last digit."""


def _rise(start: Array, end: Array, power: float, x: Array) -> Array:
    """Returns `start expm1(power x) / power` for `end = start exp(power x)`."""
    if power < _LIMIT:
        return start * x
    return softmax.step(start, end, power * x) / power


@register_objective
@dataclasses.dataclass(frozen=True)
class AlphaBeta(Divergence):
    """Alpha-beta divergence of teacher and student, a true divergence.

        -1 / (a b) sum [p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)]

    and its limits where a or b is 0: a = 1, b = 0 is KL(p || q) with the teacher's
    entropy, a = 0, b = 1 is KL(q || p). Sums run over the student's entries; with a = 0
    those that the teacher excludes are left out, as in `ReverseKL`, and with a > 0 they
    count as the formula says.

    Attributes:
        a: From 0 to 4; the larger, the more the errors at entries that the teacher
            finds probable weigh. The paper's alpha; static.
        b: From 0 to 4, a + b at least 0.01; the larger, the more those that the student
            finds probable do. The paper's beta; static.
        temperature: As in `ForwardKL`.

    Raises:
        TypeError: If a power is no Python number.
        ValueError: If a setting is out of its range.

    References:
        Wang et al., ABKD, ICML 2025 (arXiv:2505.04560); a 0.2 and b 0.7 are its
        settings for language models.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import AlphaBeta
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([1.0, 1.0, 2.0])
        >>> powers = [(1, 0), (0.2, 0.7), (0, 1)]
        >>> print([f"{AlphaBeta(a, b)(student, teacher):.2f}" for a, b in powers])
        ['0.80', '0.72', '0.63']
    """

    a: float | int = bounded(0, LARGEST_POWER, default=0.2)
    b: float | int = bounded(0, LARGEST_POWER, default=0.7)
    temperature: ArrayLike = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_static("a + b", self.a + self.b, LEAST_SUM, 2 * LARGEST_POWER)

    def _divergence(self, pair: softmax.Pair) -> Parts:
        a, b = float(self.a), float(self.b)
        both = a + b
        exact = softmax.exact_constant(pair)
        constant = jnp.where(jnp.isfinite(exact), exact, pair.constant)
        x = pair.difference - constant
        log_q = pair.student.shifted - jnp.log(pair.student.total)
        log_p = pair.teacher.shifted - jnp.log(pair.teacher.total)
        q_power, mixed = jnp.exp(both * log_q), jnp.exp(a * log_p + b * log_q)
        # Without a, an entry of the teacher's -inf would be infinitely wrong.
        no_part = pair.teacher_masked & (a < _LIMIT)
        # NaN if either row is none, also where no entry takes part.
        nothing = 0.0 * constant

        terms = _rise(mixed, jnp.exp(both * log_p), b, x)
        terms -= _rise(q_power, mixed, a, x)
        terms = jnp.where(pair.student_masked | no_part, nothing, terms)
        value = softmax.row_sum(terms) / both

        def gradient() -> Float[Array, "*tokens vocab"]:
            q = pair.student.exp / pair.student.total
            start = -constant
            at_start = _rise(jnp.ones_like(start), jnp.exp(a * start), a, start)
            # q times (slope - F) is the sum of two terms, each 0 at the largest entry.
            rise = _rise(q_power * jnp.exp(a * start), mixed, a, pair.difference)
            flat = q * pair.student.total ** (1 - both)
            bent = softmax.step(flat, q_power, (both - 1) * pair.student.shifted)
            slope = jnp.where(no_part, flat * at_start, -rise - bent * at_start)
            slope = jnp.where(pair.student_masked, nothing, slope)
            return slope - q * softmax.row_sum(slope)

        return softmax.per_token(value), gradient
