"""The products with the gradient of the logits, as a CPU does them best.

The head's gradient is added to in strips of the vocabulary: a product of the whole head
would be an array of its size, written once and read once, in every chunk.
"""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from taid_jax.loss.fused.plan import Plan
from taid_jax.loss.fused.rows import dot

STRIP = 4096
"""Entries of a strip, about. Its product stays in a core's cache."""

X = TypeVar("X")


def kernel_strips(
    plan: Plan,
    kernel: Float[Array, "..."],
    in_logits: Float[Array, "chunk vocab"],
    hidden: Float[Array, "chunk d_model"],
    model: int,
    live: Int[Array, ""] | None,
) -> Float[Array, "..."]:
    """Returns the gradient of the head with that of a chunk added.

    Args:
        plan: Sizes of the loop.
        kernel: What is added to; float32, of either orientation.
        in_logits: Of counted tokens first.
        hidden: The chunk's.
        model: Which axis of the kernel is d_model.
        live: How many tokens count; all when None.
    """
    vocab = in_logits.shape[1]
    count = -(-vocab // STRIP)
    # Kept apart: the product takes a slow path when it turns an operand.
    turned = lax.optimization_barrier(hidden.T) if model == 0 else hidden

    def add(kernel: Array, start: Array, width: int) -> Array:
        def rows(total: Array, first: Array, number: int) -> Array:
            g = lax.dynamic_slice(in_logits, (first, start), (number, width))
            h = lax.dynamic_slice_in_dim(turned, first, number, axis=1 - model)
            return total + (dot(h, g, 1, 0) if model == 0 else dot(g, h, 0, 0))

        total = lax.dynamic_slice_in_dim(kernel, start, width, axis=1 - model)
        total = over_counted(plan, live, rows, total)
        return lax.dynamic_update_slice_in_dim(kernel, total, start, axis=1 - model)

    width = vocab // count
    starts = jnp.arange(count, dtype=jnp.int32) * width
    kernel, _ = lax.scan(lambda k, start: (add(k, start, width), None), kernel, starts)
    rest = vocab - count * width
    return add(kernel, jnp.int32(count * width), rest) if rest else kernel


def over_counted(
    plan: Plan,
    live: Int[Array, ""] | None,
    work: Callable[[X, Array, int], X],
    carry: X,
) -> X:
    """Returns the carry after `work(carry, first, number)` on all counted rows.

    Args:
        plan: Sizes of the loop.
        live: How many rows of the chunk count, the first ones; all when None.
        work: Takes some rows, whose number is static.
        carry: What it starts from.
    """
    if live is None:
        return work(carry, jnp.int32(0), plan.chunk)
    size, count = plan.block, plan.chunk // plan.block
    blocks = (live + size - 1) // size

    def by_digits(carry: X) -> X:
        # Products have static shapes, and a few large ones are faster than many small
        # ones: one for each binary digit of the number of blocks.
        for digit in reversed(range((count - 1).bit_length())):
            first = (blocks >> (digit + 1) << (digit + 1)) * size
            carry = lax.cond(
                (blocks & (1 << digit)) != 0,
                lambda carry, first=first, digit=digit: work(
                    carry, first, size << digit
                ),
                lambda carry: carry,
                carry,
            )
        return carry

    return lax.cond(
        blocks == count,
        lambda carry: work(carry, jnp.int32(0), plan.chunk),
        by_digits,
        carry,
    )
