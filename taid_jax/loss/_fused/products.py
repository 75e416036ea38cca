"""The products with the gradient of the logits, and what is skipped of them."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Float

from taid_jax.loss._fused.plan import Plan
from taid_jax.loss._fused.rows import Problem, Wanted, dot
from taid_jax.loss._fused.strips import Products, over_counted, plus, strip_products

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
    model = student.axes[0]
    kernel, bias, in_hidden = sums.kernel, sums.bias, None
    if job.wanted.hidden:
        in_hidden = _hidden_parts(job, in_logits)
    if kernel is not None:
        pair = (hidden, in_logits) if model == 0 else (in_logits, hidden)
        kernel += dot(*pair, 0, 0)
        if student.transposed and job.parts == 1:
            # A TPU may otherwise add up the table's gradient turned, and turn a copy of
            # it at the end.
            kernel = with_layout_constraint(kernel, Layout((0, 1)))
    if bias is not None:
        bias += _sum_rows(in_logits)
    return Sums(sums.objective, kernel, bias), in_hidden


def _sum_rows(in_logits: Float[Array, "tokens vocab"]) -> Float[Array, " vocab"]:
    # A product: on a CPU a sum over the first axis is slow.
    ones = jnp.ones((1, in_logits.shape[0]), in_logits.dtype)
    return jnp.squeeze(dot(ones, in_logits, 1, 0), 0)


def _hidden_parts(
    job: Job, in_logits: Float[Array, "tokens vocab"]
) -> Float[Array, "parts tokens d_model"]:
    """Returns the gradient of the hidden states from each part of the vocabulary.

    Devices that share the vocabulary would have to add up their parts in every chunk;
    as a leading axis of the result the parts stay where they are.
    """
    kernel, parts = job.problem.student.kernel, job.parts
    vocab = job.problem.student.axes[1]
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
    if job.plan.cpu and job.parts == 1:
        return _cpu_products(job, sums, in_logits, hidden, live)

    def work(sums: Sums, x: tuple[Array, Array]) -> tuple[Sums, Array | None]:
        return head_products(job, sums, *x)

    counted = None if live is None else live > 0
    return work_when(counted, work, sums, (in_logits, hidden))


def _cpu_products(
    job: Job, sums: Sums, in_logits: Array, hidden: Array, live: Array | None
) -> tuple[Sums, Array | None]:
    """Returns what `chunk_products` does."""
    start = jnp.zeros(hidden.shape, jnp.float32) if job.wanted.hidden else None
    kernel, in_hidden = strip_products(
        job.plan,
        Products(sums.kernel, start),
        job.problem.student,
        in_logits,
        hidden,
        live,
    )
    if in_hidden is not None:
        in_hidden = jnp.expand_dims(in_hidden, 0)

    def of_rows(first: Array, number: int) -> Products:
        rows = lax.dynamic_slice_in_dim(in_logits, first, number)
        return Products(_sum_rows(rows), None)

    bias = sums.bias
    if bias is not None:
        bias = plus(bias, over_counted(job.plan, live, of_rows).kernel)
    return Sums(sums.objective, kernel, bias), in_hidden
