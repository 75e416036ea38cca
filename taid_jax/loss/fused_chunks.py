"""The loop of the fused head on one device: chunks of tokens, each over all entries.

Three sizes nest. A chunk is what one product with the logits' gradient takes: every
chunk reads and writes the head's gradient once. A block is what one product into
logits takes, and rows are what the objective sees at once. An accelerator fuses the
objective into few passes, and the three are the same there. On a CPU nearly every
operation is a pass over memory, so rows are few enough for its cache.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, Shaped

from taid_jax.loss.fused_rows import (
    Problem,
    Wanted,
    dot,
    evaluate_rows,
    head_product,
    kernel_axes,
    split_objective,
)
from taid_jax.loss.reduce import select_tokens, weighted_sum
from taid_jax.types import IGNORE_INDEX

_ENTRIES = {
    "cpu": (2**17, 2**23, 2**25),
    "tpu": (2**24, 2**26, 2**27),
    "gpu": (2**27, 2**27, 2**27),
}
"""Logits of rows, of a block and of a chunk, at most.

Measured. On a CPU: rows of half a megabyte, and chunks that pass over the head's
gradient rarely. On a TPU, by its compiler's own count of cycles and bytes: rows keep
the objective's arrays small, which leaves room for larger products. A GPU starts every
operation anew, so the three are one."""

Carry = TypeVar("Carry")
X = TypeVar("X")
Y = TypeVar("Y")


class Plan(NamedTuple):
    """Sizes of the loop in tokens, each dividing the next, and what it runs on."""

    rows: int
    block: int
    chunk: int
    cpu: bool


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


class _Job(NamedTuple):
    problem: Problem
    plan: Plan
    wanted: Wanted
    dtype: jnp.dtype


class _Sums(NamedTuple):
    """What the loop adds up; None where not wanted."""

    objective: list[Array] | None
    kernel: Array | None
    bias: Array | None


class _Results(NamedTuple):
    """What the loop gives per token."""

    losses: Array
    metrics: dict[str, Array]
    hidden: Array | None


_Carry = tuple[_Sums, Array | None]
_Work = Callable[[_Carry, tuple[Array, Array]], tuple[_Carry, None]]


def make_plan(tokens: int, vocab: int, platform: str, chunk_size: int | None) -> Plan:
    """Returns the sizes of the loop for the tokens of one device.

    Args:
        tokens: How many there are, at least 1.
        vocab: Entries of the head on this device.
        platform: "cpu", "gpu" or "tpu".
        chunk_size: Tokens of a chunk, rounded up to whole rows; chosen when None.
    """
    # Powers of two divide most batches.
    rows, block, chunk = (
        1 << max(entries // vocab, 1).bit_length() - 1
        for entries in _ENTRIES.get(platform, _ENTRIES["gpu"])
    )
    # Of fewer tokens, a product spends its time on reading the head.
    block, chunk = max(block, 128), max(chunk, 128)
    chunk = _even(tokens, chunk if chunk_size is None else chunk_size)
    block = _even(chunk, block)
    rows = _even(block, rows)
    # A TPU holds 8 rows in a tile.
    rows = -(-rows // 8) * 8 if rows > 8 else rows
    block = -(-block // rows) * rows
    return Plan(rows, block, -(-chunk // block) * block, platform == "cpu")


def _even(total: int, most: int) -> int:
    """Returns the size of equal parts of `total`, none above `most`."""
    return -(-total // -(-total // most))


def run_chunks(
    problem: Problem,
    tokens: Tokens,
    masked: bool,
    plan: Plan,
    wanted: Wanted,
    spread: Callable[[Array], Array] = lambda kernel: kernel,
) -> Outcome:
    """Returns the sums over the tokens of one device.

    Args:
        problem: Objective and heads.
        tokens: At least one.
        masked: Whether weights of 0 are expected. Tokens that count are then brought
            together first, and what holds none does no work.
        plan: Sizes of the loop.
        wanted: Which gradients are formed; without any, none of their work is done.
        spread: Lays the head's gradient out over a mesh as its kernel is.
    """
    count = tokens.weight.shape[0]
    chunks = -(-count // plan.chunk)
    pad = chunks * plan.chunk - count
    job = _Job(problem, plan, wanted, tokens.student.dtype)
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
        order, total = None, None

    def body(carry: _Carry, index: Array):
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

    carry = _start(job, tokens, spread)
    if chunks == 1:
        carry, results = body(carry, jnp.int32(0))
    else:
        carry, results = lax.scan(body, carry, jnp.arange(chunks, dtype=jnp.int32))
        results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
    sums = carry[0]
    hidden = results.hidden
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
        weighted_sum(results.losses, weight),
        {name: weighted_sum(x, weight) for name, x in results.metrics.items()},
        Gradients(sums.objective, hidden, sums.kernel, sums.bias),
    )


def _gather(tokens: Tokens, order: Int[Array, " chunk"]) -> Tokens:
    """Returns some tokens; those of weight 0 with hidden states of 0, NaN or not."""

    def take(x: Array | None, fill: int) -> Array | None:
        if x is None:
            return None
        return jnp.take(x, order, axis=0, mode="fill", fill_value=fill)

    weight = jnp.take(tokens.weight, order, mode="fill", fill_value=0)
    student, teacher = take(tokens.student, 0), take(tokens.teacher, 0)
    return Tokens(
        select_tokens(student, weight),
        None if teacher is None else select_tokens(teacher, weight),
        weight,
        take(tokens.labels, IGNORE_INDEX),
    )


def _start(
    job: _Job, tokens: Tokens, spread: Callable[[Array], Array]
) -> tuple[_Sums, Array | None]:
    """Returns the loop's first carry: sums of 0, room for the gradient of logits."""
    wanted, student = job.wanted, job.problem.student
    leaves = split_objective(job.problem.objective)[0]
    vocab = student.kernel.shape[
        kernel_axes(student.kernel, tokens.student.shape[1])[1]
    ]
    sums = _Sums(
        [jnp.zeros_like(leaf) for leaf in leaves] if wanted.objective else None,
        spread(jnp.zeros(student.kernel.shape, jnp.float32)) if wanted.kernel else None,
        jnp.zeros((vocab,), jnp.float32) if wanted.bias else None,
    )
    nested = job.plan.rows != job.plan.chunk
    room = nested and wanted.logits
    return sums, jnp.zeros((job.plan.chunk, vocab), job.dtype) if room else None


def _when(
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


def _add(sums: list[Array] | None, terms: list[Array] | None) -> list[Array] | None:
    if sums is None or terms is None:
        return None
    return [a + b for a, b in zip(sums, terms, strict=True)]


def _products(
    job: _Job, sums: _Sums, in_logits: Array, hidden: Array
) -> tuple[_Sums, Array | None]:
    """Adds the gradients of the head, returns that of the hidden states."""
    student = job.problem.student
    model, vocab = kernel_axes(student.kernel, hidden.shape[1])
    kernel, bias, in_hidden = sums.kernel, sums.bias, None
    if job.wanted.hidden:
        in_hidden = dot(in_logits, student.kernel, 1, vocab)
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
    return _Sums(sums.objective, kernel, bias), in_hidden


def _flat_chunk(
    job: _Job,
    carry: _Carry,
    chunk: Tokens,
    live: Array | None,
) -> tuple[_Carry, _Results]:
    """Takes a chunk at once; `live` of its tokens count, all when None."""

    def work(sums: _Sums, chunk: Tokens) -> tuple[_Sums, _Results]:
        problem, teacher = job.problem, None
        if problem.teacher is not None and chunk.teacher is not None:
            teacher = head_product(chunk.teacher, problem.teacher)
        student = head_product(chunk.student, problem.student)
        rows = evaluate_rows(
            problem,
            student,
            teacher,
            chunk.weight,
            chunk.labels,
            job.wanted,
            job.dtype,
        )
        sums = sums._replace(objective=_add(sums.objective, rows.objective))
        in_hidden = None
        if rows.product is not None:
            sums, in_hidden = _products(job, sums, rows.product, chunk.student)
        return sums, _Results(rows.losses, rows.metrics, in_hidden)

    sums, results = _when(None if live is None else live > 0, work, carry[0], chunk)
    return (sums, carry[1]), results


def _nested_chunk(
    job: _Job,
    carry: _Carry,
    chunk: Tokens,
    live: Array | None,
) -> tuple[_Carry, _Results]:
    """Takes a chunk in blocks and rows; `live` of its tokens count, all when None."""
    plan, problem = job.plan, job.problem

    def row(carry, x):
        (leaves, room), (start, student, teacher, weight, labels) = carry, x
        rows = evaluate_rows(
            problem, student, teacher, weight, labels, job.wanted, job.dtype
        )
        if room is not None and rows.product is not None:
            room = lax.dynamic_update_slice_in_dim(room, rows.product, start, 0)
        return (_add(leaves, rows.objective), room), (rows.losses, rows.metrics)

    def block(carry, x):
        start, tokens = x

        def work(carry, tokens: Tokens):
            teacher = None
            if problem.teacher is not None and tokens.teacher is not None:
                teacher = head_product(tokens.teacher, problem.teacher)
            student = head_product(tokens.student, problem.student)
            starts = start + jnp.arange(0, plan.block, plan.rows, dtype=jnp.int32)
            rows = _split((student, teacher, tokens.weight, tokens.labels), plan.rows)
            return lax.scan(row, carry, (starts, *rows))

        return _when(None if live is None else start < live, work, carry, tokens)

    sums, room = carry
    starts = jnp.arange(0, plan.chunk, plan.block, dtype=jnp.int32)
    (leaves, room), results = lax.scan(
        block, (sums.objective, room), (starts, _split(chunk, plan.block))
    )
    losses, metrics = jax.tree.map(lambda x: x.reshape(-1), results)
    sums, in_hidden = sums._replace(objective=leaves), None
    if room is not None:
        sums, in_hidden = _chunk_products(job, sums, room, chunk.student, live)
    return (sums, room), _Results(losses, metrics, in_hidden)


def _split(tree: X, size: int) -> X:
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def _chunk_products(
    job: _Job, sums: _Sums, in_logits: Array, hidden: Array, live: Array | None
) -> tuple[_Sums, Array | None]:
    """Returns `_products` of a chunk, of which `live` tokens count, all when None."""
    if live is None:
        return _products(job, sums, in_logits, hidden)
    size, count = job.plan.block, job.plan.chunk // job.plan.block
    blocks = (live + size - 1) // size

    def part(number: int, start: Array) -> _Work:
        def work(carry: _Carry, x: tuple[Array, Array]) -> tuple[_Carry, None]:
            g, h = (lax.dynamic_slice_in_dim(y, start, number * size) for y in x)
            sums, new = _products(job, carry[0], g, h)
            if carry[1] is None or new is None:
                return (sums, None), None
            return (
                sums,
                lax.dynamic_update_slice_in_dim(carry[1], new, start, 0),
            ), None

        return work

    def by_digits(carry: _Carry, x: tuple[Array, Array]) -> tuple[_Carry, None]:
        # Products have static shapes, and a few large ones are faster than many small
        # ones: one for each binary digit of the number of blocks.
        for digit in reversed(range((count - 1).bit_length())):
            start = (blocks >> (digit + 1) << (digit + 1)) * size
            held = (blocks & (1 << digit)) != 0
            carry, _ = _when(held, part(1 << digit, start), carry, x)
        return carry, None

    whole = part(count, jnp.int32(0))
    in_hidden = jnp.zeros(hidden.shape, jnp.float32) if job.wanted.hidden else None
    carry, x = (sums, in_hidden), (in_logits, hidden)
    if job.plan.cpu:
        return lax.cond(blocks == count, whole, by_digits, carry, x)[0]
    return _when(live > 0, whole, carry, x)[0]
