"""The loop of the fused head on one device: chunks of tokens, each over all entries.

Tokens that count are brought together first. A chunk is then taken in blocks and a
block in steps of some rows (see `plan`), and what holds no counted token is skipped.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, Shaped

from taid_jax.loss._fused.plan import Plan
from taid_jax.loss._fused.products import (
    Job,
    LoopCarry,
    Sums,
    chunk_products,
    head_products,
    work_when,
)
from taid_jax.loss._fused.rows import (
    Problem,
    Rows,
    Wanted,
    evaluate_rows,
    head_product,
    split_objective,
)
from taid_jax.loss._reduce import select_tokens, weighted_sum
from taid_jax.types import IGNORE_INDEX

X = TypeVar("X")


class Tokens(NamedTuple):
    """What comes with every token."""

    student: Shaped[Array, "tokens d_student"]
    teacher: Shaped[Array, "tokens d_teacher"] | None
    weight: Float[Array, " tokens"]
    labels: Int[Array, " tokens"] | None


class Gradients(NamedTuple):
    """Gradients of the summed loss, float32; None where not wanted."""

    objective: list[Array] | None
    hidden: Float[Array, "tokens d_student"] | None
    kernel: Float[Array, "..."] | None
    bias: Float[Array, " vocab"] | None


class Outcome(NamedTuple):
    """Weighted sums over the tokens of one device, and gradients of the first."""

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    gradients: Gradients


class _Results(NamedTuple):
    """What the loop gives per token; `hidden` has an axis of parts before that."""

    losses: Array
    metrics: dict[str, Array]
    hidden: Array | None


def run_chunks(
    problem: Problem,
    tokens: Tokens,
    masked: bool,
    plan: Plan,
    wanted: Wanted,
    spread: Callable[[Array, int], Array] = lambda array, axis: array,
    parts: int = 1,
) -> Outcome:
    """Returns the sums over the tokens of one device.

    Args:
        problem: Objective and heads.
        tokens: At least one.
        masked: Whether weights of 0 are expected. Tokens that count are then brought
            together first, and what holds none does no work.
        plan: Sizes of the loop.
        wanted: Which gradients are formed; without any, none of their work is done.
        spread: Lays an axis of an array out over the devices that share the vocabulary.
        parts: How many those are.
    """
    count = tokens.weight.shape[0]
    chunks = -(-count // plan.chunk)
    pad = chunks * plan.chunk - count
    job = Job(problem, plan, wanted, tokens.student.dtype, spread, parts)
    step = _flat_chunk if plan.rows == plan.chunk else _nested_chunk
    counted = tokens.weight != 0
    if masked:
        order = jnp.argsort(~counted, stable=True).astype(jnp.int32)
        order = jnp.pad(order, (0, pad), constant_values=count)
        total = jnp.sum(counted.astype(jnp.int32))
    else:
        tokens = jax.tree.map(
            lambda x: jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)), tokens
        )
        order, total = None, jnp.int32(count)

    def body(carry: LoopCarry, index: Array) -> tuple[LoopCarry, _Results]:
        start = index * plan.chunk
        if order is None:
            chunk = jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, start, plan.chunk), tokens
            )
            live = None
        else:
            chunk = _gather(tokens, lax.dynamic_slice_in_dim(order, start, plan.chunk))
            live = jnp.clip(total - start, 0, plan.chunk)
        return step(job, carry, chunk, live)

    carry = _start(job)
    if chunks == 1:
        carry, results = body(carry, jnp.int32(0))
        results = jax.tree.map(lambda x: jnp.expand_dims(x, 0), results)
    else:
        carry, results = lax.scan(body, carry, jnp.arange(chunks, dtype=jnp.int32))
    sums = carry[0]
    hidden = results.hidden
    if hidden is not None:
        hidden = jnp.squeeze(hidden, 1) if parts == 1 else jnp.sum(hidden, axis=1)
    losses, metrics, hidden = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (results.losses, results.metrics, hidden)
    )
    weight = tokens.weight
    if order is not None:
        weight = jnp.take(weight, order, mode="fill", fill_value=0)
        if hidden is not None:
            place = jnp.cumsum(counted.astype(jnp.int32)) - 1
            place = jnp.clip(place, 0, hidden.shape[0] - 1)
            hidden = select_tokens(jnp.take(hidden, place, axis=0), counted)
    elif hidden is not None:
        hidden = hidden[:count]
    return Outcome(
        weighted_sum(losses, weight),
        {name: weighted_sum(x, weight) for name, x in metrics.items()},
        Gradients(sums.objective, hidden, sums.kernel, sums.bias),
    )


def _gather(tokens: Tokens, order: Int[Array, " chunk"]) -> Tokens:
    """Returns some tokens; those of weight 0 with hidden states of 0, NaN or not."""

    def take(x: Array, fill: int) -> Array:
        return jnp.take(x, order, axis=0, mode="fill", fill_value=fill)

    weight = take(tokens.weight, 0)
    student, teacher = jax.tree.map(
        lambda x: select_tokens(take(x, 0), weight), (tokens.student, tokens.teacher)
    )
    labels = None if tokens.labels is None else take(tokens.labels, IGNORE_INDEX)
    return Tokens(student, teacher, weight, labels)


def _start(job: Job) -> LoopCarry:
    """Returns the loop's first carry: sums of 0, room for the gradient of logits."""
    wanted, student = job.wanted, job.problem.student
    leaves = split_objective(job.problem.objective)[0]
    axis = student.axes[1]
    vocab, kernel = student.kernel.shape[axis], None
    if wanted.kernel:
        kernel = job.spread(jnp.zeros(student.kernel.shape, jnp.float32), axis)
    sums = Sums(
        [jnp.zeros_like(leaf) for leaf in leaves] if wanted.objective else None,
        kernel,
        jnp.zeros((vocab,), jnp.float32) if wanted.bias else None,
    )
    nested = job.plan.rows != job.plan.chunk
    room = nested and wanted.logits
    return sums, jnp.zeros((job.plan.chunk, vocab), job.dtype) if room else None


def _add(sums: list[Array] | None, terms: list[Array] | None) -> list[Array] | None:
    if sums is None or terms is None:
        return None
    return [a + b for a, b in zip(sums, terms, strict=True)]


def _block_products(job: Job, tokens: Tokens) -> tuple[Array, Array | None]:
    """Returns the products of both models' hidden states with their kernels."""
    problem, teacher = job.problem, None
    if problem.teacher is not None and tokens.teacher is not None:
        teacher = head_product(tokens.teacher, problem.teacher)
    return head_product(tokens.student, problem.student), teacher


def _evaluate(
    job: Job, products: tuple[Array, Array | None], tokens: tuple[Array, Array | None]
) -> Rows:
    return evaluate_rows(job.problem, *products, *tokens, job.wanted, job.dtype)


def _flat_chunk(
    job: Job, carry: LoopCarry, chunk: Tokens, live: Array | None
) -> tuple[LoopCarry, _Results]:
    """Takes a chunk at once; `live` of its tokens count, all when None."""

    def work(sums: Sums, chunk: Tokens) -> tuple[Sums, _Results]:
        products = _block_products(job, chunk)
        rows = _evaluate(job, products, (chunk.weight, chunk.labels))
        sums = sums._replace(objective=_add(sums.objective, rows.objective))
        in_hidden = None
        if rows.product is not None:
            sums, in_hidden = head_products(job, sums, rows.product, chunk.student)
        return sums, _Results(rows.losses, rows.metrics, in_hidden)

    sums, results = work_when(None if live is None else live > 0, work, carry[0], chunk)
    return (sums, carry[1]), results


_RowsCarry = tuple[list[Array] | None, Array | None]
_PerToken = tuple[Array, dict[str, Array]]


def _nested_chunk(
    job: Job, carry: LoopCarry, chunk: Tokens, live: Array | None
) -> tuple[LoopCarry, _Results]:
    """Takes a chunk in blocks and steps; `live` of its tokens count, all when None."""
    plan = job.plan

    def step(carry: _RowsCarry, x: tuple) -> tuple[_RowsCarry, _PerToken]:
        (leaves, room), (start, *of_step) = carry, x
        size, per_token = plan.rows // plan.groups, []
        for first in range(0, plan.rows, size):
            products, tokens = jax.tree.map(
                lambda x, first=first: lax.slice_in_dim(x, first, first + size), of_step
            )
            rows = _evaluate(job, products, tokens)
            if room is not None and rows.product is not None:
                room = lax.dynamic_update_slice_in_dim(
                    room, rows.product, start + first, 0
                )
            leaves = _add(leaves, rows.objective)
            per_token.append((rows.losses, rows.metrics))
        return (leaves, room), jax.tree.map(lambda *x: jnp.concatenate(x), *per_token)

    def block(carry: _RowsCarry, x: tuple) -> tuple[_RowsCarry, _PerToken]:
        start, tokens = x

        def work(carry: _RowsCarry, tokens: Tokens) -> tuple[_RowsCarry, _PerToken]:
            starts = start + jnp.arange(0, plan.block, plan.rows, dtype=jnp.int32)
            both = _block_products(job, tokens), (tokens.weight, tokens.labels)
            return lax.scan(step, carry, (starts, *_split(both, plan.rows)))

        return work_when(None if live is None else start < live, work, carry, tokens)

    sums, room = carry
    starts = jnp.arange(0, plan.chunk, plan.block, dtype=jnp.int32)
    (leaves, room), per_token = lax.scan(
        block, (sums.objective, room), (starts, _split(chunk, plan.block))
    )
    losses, metrics = jax.tree.map(lambda x: x.reshape(-1), per_token)
    sums, in_hidden = sums._replace(objective=leaves), None
    if room is not None:
        sums, in_hidden = chunk_products(job, sums, room, chunk.student, live)
    return (sums, room), _Results(losses, metrics, in_hidden)


def _split(tree: X, size: int) -> X:
    """Returns arrays with their leading axis in parts of `size`."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)
