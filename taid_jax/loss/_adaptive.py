"""Adaptive KL: forward and reverse KL, weighted by where the distributions differ."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._cross_entropy import forward, reverse
from taid_jax.loss._exact import Parts


def head_entries(
    teacher: softmax.Row, threshold: float
) -> Bool[Array, "*tokens vocab"]:
    """Returns the most probable entries that together hold `threshold` of the mass.

    The smallest such set; entries as probable as its last one belong to it, so that it
    does not depend on the order of the vocabulary. The least probability in it is found
    by bisection: thirty sums over the vocabulary take less than sorting it, and stay
    sums when it is sharded.
    """
    # Floats that are not negative have the order of their bits.
    bits = jax.lax.bitcast_convert_type(teacher.exp, jnp.int32)
    needed = threshold * teacher.total
    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    low = jnp.zeros_like(needed, jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        held = softmax.row_sum(jnp.where(bits >= middle, teacher.exp, 0.0))
        enough = held >= needed
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # The bits of numbers in [0, 1] are below 2**30: thirty halvings leave one.
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, low + one + 1))
    return bits >= low


def adaptive(pair: softmax.Pair, head_threshold: float | int) -> Parts:
    """Returns `w_head * forward + w_tail * reverse`; the weights carry no gradient."""
    head = head_entries(pair.teacher, head_threshold)
    gap = jnp.abs(softmax.change(pair))
    head_gap = softmax.row_sum(jnp.where(head, gap, 0.0))
    tail_gap = softmax.row_sum(jnp.where(head, 0.0, gap))
    both = head_gap + tail_gap
    # Equal distributions have no gap: half and half, and no gradient either way.
    weight = jnp.where(both == 0, 0.5, head_gap / jnp.where(both == 0, 1.0, both))
    (forward_value, forward_gradient), (reverse_value, reverse_gradient) = (
        forward(pair),
        reverse(pair),
    )
    column = softmax.per_token(weight)
    value = column * forward_value + (1 - column) * reverse_value

    def gradient() -> Float[Array, "*tokens vocab"]:
        return weight * forward_gradient() + (1 - weight) * reverse_gradient()

    return value, gradient
