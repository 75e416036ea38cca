"""The products with the gradient of the logits, as a CPU does them best.

Both go through the vocabulary in strips, whose operands stay in a core's cache. The
product for the whole head would also be an array of its size, written and read once
more in every chunk.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from taid_jax.loss.fused.plan import Plan
from taid_jax.loss.fused.rows import dot
from taid_jax.types import Head

STRIP = 2048
"""Entries of a strip, about."""

X = TypeVar("X")


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

        def rows(carry: Products, first: Array, number: int) -> Products:
            g = lax.dynamic_slice(in_logits, (first, start), (number, width))
            part, in_hidden = carry
            if part is not None:
                h = lax.dynamic_slice_in_dim(turned, first, number, axis=tokens)
                part += dot(h, g, 1, 0) if model == 0 else dot(g, h, 0, 0)
            if in_hidden is not None:
                old = lax.dynamic_slice_in_dim(in_hidden, first, number)
                new = old + dot(g, weights, 1, vocab)
                in_hidden = lax.dynamic_update_slice_in_dim(in_hidden, new, first, 0)
            return Products(part, in_hidden)

        whole, part = sums.kernel, None
        if whole is not None:
            part = lax.dynamic_slice_in_dim(whole, start, width, axis=vocab)
        part, in_hidden = over_counted(plan, live, rows, Products(part, sums.hidden))
        if whole is not None and part is not None:
            whole = lax.dynamic_update_slice_in_dim(whole, part, start, axis=vocab)
        return Products(whole, in_hidden)

    count = -(-size // STRIP)
    width = size // count
    starts = jnp.arange(count, dtype=jnp.int32) * width
    sums, _ = lax.scan(
        lambda sums, start: (add(sums, start, width), None), sums, starts
    )
    rest = size - count * width
    return add(sums, jnp.int32(count * width), rest) if rest else sums


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
