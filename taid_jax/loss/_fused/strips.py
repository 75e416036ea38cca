"""The products with the gradient of the logits, as a CPU does them best.

Both go through the vocabulary in strips, whose operands stay in a core's cache. The
product for the whole head would also be an array of its size, written and read once
more in every chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from taid_jax.loss._fused.plan import Plan
from taid_jax.loss._fused.rows import dot
from taid_jax.types import Head

STRIP = 2048
"""Entries of a strip, about."""


class Products(NamedTuple):
    """Gradients of the head and of the chunk's hidden states; None where not wanted."""

    kernel: Array | None
    hidden: Float[Array, "chunk d_model"] | None


def strip_products(
    plan: Plan,
    sums: Products,
    head: Head,
    in_logits: Float[Array, "chunk vocab"],
    hidden: Float[Array, "chunk d_model"],
    live: Int[Array, ""] | None,
) -> Products:
    """Returns gradients with the products of a chunk added.

    Args:
        plan: Sizes of the loop.
        sums: What is added to, float32.
        head: The student's.
        in_logits: Of counted tokens first.
        hidden: The chunk's.
        live: How many tokens count; all when None.
    """
    model, vocab = head.axes
    size, tokens = in_logits.shape[1], 1 - model
    # Kept apart: the product takes a slow path when it turns an operand.
    turned = lax.optimization_barrier(hidden.T) if model == 0 else hidden

    def add(sums: Products, start: Array, width: int) -> Products:
        weights = lax.dynamic_slice_in_dim(head.kernel, start, width, axis=vocab)

        def of_rows(first: Array, number: int) -> Products:
            g = lax.dynamic_slice(in_logits, (first, start), (number, width))
            strip, in_hidden = None, None
            if sums.kernel is not None:
                h = lax.dynamic_slice_in_dim(turned, first, number, axis=tokens)
                strip = dot(h, g, 1, 0) if model == 0 else dot(g, h, 0, 0)
            if sums.hidden is not None:
                in_hidden = dot(g, weights, 1, vocab)
            return Products(strip, in_hidden)

        # Added out here, slice, sum and update are one pass over the strip.
        kernel, in_hidden = sums
        more, more_hidden = over_counted(plan, live, of_rows)
        if kernel is not None and more is not None:
            more += lax.dynamic_slice_in_dim(kernel, start, width, axis=vocab)
            kernel = lax.dynamic_update_slice_in_dim(kernel, more, start, axis=vocab)
        return Products(kernel, plus(in_hidden, more_hidden))

    count = -(-size // STRIP)
    width = size // count
    starts = jnp.arange(count, dtype=jnp.int32) * width
    sums, _ = lax.scan(
        lambda sums, start: (add(sums, start, width), None), sums, starts
    )
    rest = size - count * width
    return add(sums, jnp.int32(count * width), rest) if rest else sums


def plus(a: Array | None, b: Array | None) -> Array | None:
    """Returns the sum; None where either is not wanted."""
    return None if a is None or b is None else a + b


def over_counted(
    plan: Plan,
    live: Int[Array, ""] | None,
    of_rows: Callable[[Array, int], Products],
) -> Products:
    """Returns the products of all counted rows of a chunk.

    Args:
        plan: Sizes of the loop.
        live: How many rows of the chunk count, the first ones; all when None.
        of_rows: Returns the products of `number` rows, which is static, from `first`.
    """

    def whole() -> Products:
        return of_rows(jnp.int32(0), plan.chunk)

    if live is None:
        return whole()
    size, count = plan.block, plan.chunk // plan.block
    blocks = (live + size - 1) // size

    def by_digits() -> Products:
        # Products have static shapes, and a few large ones are faster than many small
        # ones: one for each binary digit of the number of blocks.
        sums = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(whole)
        )
        for digit in reversed(range((count - 1).bit_length())):
            first = (blocks >> (digit + 1) << (digit + 1)) * size

            def add(sums: Products, first=first, number=size << digit) -> Products:
                kernel, hidden = of_rows(first, number)
                if hidden is not None and sums.hidden is not None:
                    hidden = lax.dynamic_update_slice_in_dim(
                        sums.hidden, hidden, first, 0
                    )
                return Products(plus(sums.kernel, kernel), hidden)

            sums = lax.cond((blocks & (1 << digit)) != 0, add, lambda sums: sums, sums)
        return sums

    return lax.cond(blocks == count, whole, by_digits)
