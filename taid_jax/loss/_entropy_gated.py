"""Reverse KL, and forward KL beside it where the teacher is unsure."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._divergences import Divergence, forward, reverse
from taid_jax.loss._objective import Parts, bounded, register_objective

LARGEST_ENTROPY = 100.0
"""In nats; no vocabulary has as much."""


@register_objective
@dataclasses.dataclass(frozen=True)
class EntropyGated(Divergence):
    """KL(q || p), and KL(p || q) added where the teacher's entropy is above a number.

    Both are true divergences, entropies included: the loss is 0 at equal distributions
    and does not jump by an entropy from one token to the next. Made for texts of the
    student, where reverse KL alone has it settle for one of the ways on that a teacher
    sees.

    Attributes:
        threshold: In nats, from 0 to 100; static. The entropy is that of the teacher's
            softmax at `temperature`.
        temperature: As in `ForwardKL`.

    Raises:
        TypeError: If the threshold is no Python number.
        ValueError: If a setting is out of its range.

    References:
        Jin et al., Entropy-Aware On-Policy Distillation of Language Models,
        arXiv:2603.07079.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import EntropyGated
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> losses = [EntropyGated(nats)(student, teacher) for nats in (0.8, 0.9)]
        >>> print([f"{loss:.3f}" for loss in losses])
        ['2.301', '1.150']
    """

    threshold: float | int = bounded(0, LARGEST_ENTROPY)
    temperature: ArrayLike = 1.0

    def _divergence(self, pair: softmax.Pair) -> Parts:
        p = pair.teacher
        entropy = jnp.log(p.total) - softmax.row_sum(p.exp * p.shifted) / p.total
        unsure = entropy > self.threshold
        value, in_reverse = reverse(pair)
        _, in_forward = forward(pair)
        mean = softmax.row_sum(pair.target.exp * pair.difference) / p.total
        covered = jnp.where(unsure, mean - pair.mass * pair.constant, 0.0)
        value += softmax.per_token(covered)

        def gradient() -> Float[Array, "*tokens vocab"]:
            return in_reverse() + jnp.where(unsure, in_forward(), 0.0)

        return value, gradient
