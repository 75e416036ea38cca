"""The products with the gradient of the logits, and what is skipped of them."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from taid_jax.loss.fused.plan import Plan
from taid_jax.loss.fused.rows import Problem, Wanted, dot, kernel_axes

Carry = TypeVar("Carry")
X = TypeVar("X")
Y = TypeVar("Y")


class Job(NamedTuple):
    """What the loop is to do.

    Attributes:
        problem: Objective and heads.
        plan: Sizes of the loop.
        wanted: Which gradients are formed.
        dtype: That of products.
        spread: Lays an array out with an axis over the devices that share the
            vocabulary.
        parts: How many those are.
    """

    problem: Problem
    plan: Plan
    wanted: Wanted
    dtype: jnp.dtype
    spread: Callable[[Array, int], Array]
    parts: int


class Sums(NamedTuple):
    """What the loop adds up; None where not wanted."""

    objective: list[Array] | None
    kernel: Array | None
    bias: Array | None


LoopCarry = tuple[Sums, Array | None]
"""The sums, and beside them an array that fills."""

_Work = Callable[[LoopCarry, tuple[Array, Array]], tuple[LoopCarry, None]]


def work_when(
    pred: Array | None,
    work: Callable[[Carry, X], tuple[Carry, Y]],
    carry: Carry,
    x: X,
) -> tuple[Carry, Y]:
    """Returns `work(carry, x)`; the carry and zeros instead where `pred` is False."""
    if pred is None:
        return work(carry, x)
    results = jax.eval_shape(lambda carry, x: work(carry, x)[1], carry, x)

    def skip(carry: Carry, x: X) -> tuple[Carry, Y]:
        del x
        return carry, jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), results)

    return lax.cond(pred, work, skip, carry, x)


def head_products(
    job: Job, sums: Sums, in_logits: Array, hidden: Array
) -> tuple[Sums, Array | None]:
    """Adds the gradients of the head, returns that of the hidden states.

    The latter is `(parts, tokens, d_model)`, to be summed over the first axis.
    """
    student = job.problem.student
    model, vocab = kernel_axes(student.kernel, hidden.shape[1])
    kernel, bias, in_hidden = sums.kernel, sums.bias, None
    if job.wanted.hidden:
        in_hidden = _hidden_parts(job, in_logits, vocab)
    if kernel is not None and model == 0:
        turned = hidden.T
        if job.plan.cpu:
            # Kept apart: the product takes a slow path when it turns an operand.
            turned = lax.optimization_barrier(turned)
        kernel += dot(turned, in_logits, 1, 0)
    elif kernel is not None:
        kernel += dot(in_logits, hidden, 0, 0)
    if bias is not None:
        # A product: on a CPU a sum over the first axis is slow.
        ones = jnp.ones((1, in_logits.shape[0]), in_logits.dtype)
        bias += jnp.squeeze(dot(ones, in_logits, 1, 0), 0)
    return Sums(sums.objective, kernel, bias), in_hidden


def _hidden_parts(
    job: Job, in_logits: Float[Array, "tokens vocab"], vocab: int
) -> Float[Array, "parts tokens d_model"]:
    """Returns the gradient of the hidden states from each part of the vocabulary.

    Devices that share the vocabulary would have to add up their parts in every chunk;
    as a leading axis of the result the parts stay where they are.
    """
    kernel, parts = job.problem.student.kernel, job.parts
    if parts == 1:
        return jnp.expand_dims(dot(in_logits, kernel, 1, vocab), 0)
    model = kernel.shape[1 - vocab]
    in_logits = in_logits.reshape(in_logits.shape[0], parts, -1)
    shape = (parts, -1, model) if vocab == 0 else (model, parts, -1)
    kernel = kernel.reshape(shape)
    contracted = ((2,), (1 if vocab == 0 else 2,))
    product = lax.dot_general(
        in_logits,
        kernel,
        (contracted, ((1,), (vocab,))),
        preferred_element_type=jnp.float32,
    )
    return job.spread(product, 0)


def chunk_products(
    job: Job, sums: Sums, in_logits: Array, hidden: Array, live: Array | None
) -> tuple[Sums, Array | None]:
    """Returns `head_products` of a chunk; what has no counted token is left out.

    Args:
        job: What to do.
        sums: What is added to.
        in_logits: `(chunk, vocab)`, of counted tokens first.
        hidden: `(chunk, d_model)`.
        live: How many tokens count; all when None.
    """
    if live is None:
        return head_products(job, sums, in_logits, hidden)
    size, count = job.plan.block, job.plan.chunk // job.plan.block
    blocks = (live + size - 1) // size

    def part(number: int, start: Array) -> _Work:
        def work(carry: LoopCarry, x: tuple[Array, Array]) -> tuple[LoopCarry, None]:
            g, h = (lax.dynamic_slice_in_dim(y, start, number * size) for y in x)
            sums, new = head_products(job, carry[0], g, h)
            in_hidden = carry[1]
            if in_hidden is not None and new is not None:
                in_hidden = lax.dynamic_update_slice_in_dim(in_hidden, new, start, 1)
            return (sums, in_hidden), None

        return work

    def by_digits(carry: LoopCarry, x: tuple[Array, Array]) -> tuple[LoopCarry, None]:
        # Products have static shapes, and a few large ones are faster than many small
        # ones: one for each binary digit of the number of blocks.
        for digit in reversed(range((count - 1).bit_length())):
            start = (blocks >> (digit + 1) << (digit + 1)) * size
            held = (blocks & (1 << digit)) != 0
            carry, _ = work_when(held, part(1 << digit, start), carry, x)
        return carry, None

    whole = part(count, jnp.int32(0))
    in_hidden = None
    if job.wanted.hidden:
        in_hidden = jnp.zeros((job.parts, *hidden.shape), jnp.float32)
        in_hidden = job.spread(in_hidden, 0)
    carry, x = (sums, in_hidden), (in_logits, hidden)
    if job.plan.cpu:
        return lax.cond(blocks == count, whole, by_digits, carry, x)[0]
    return work_when(live > 0, whole, carry, x)[0]
