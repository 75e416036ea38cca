"""The scan of the fused head over the chunks of one device's tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from taid_jax.loss._fused_chunk import Problem, Static, Tokens, add_chunk, is_smooth
from taid_jax.loss._fused_mesh import (
    Fixed,
    Gradients,
    Moving,
    Outcome,
    Partition,
    spread_vocabulary,
)
from taid_jax.loss._reduce import select_tokens, token_weights
from taid_jax.types import Head

_ENTRIES = {"cpu": 3 * 2**22, "gpu": 2**27, "tpu": 2**27}
"""Logits of a chunk, at most. A chunk reads and writes the head's gradient once, and
holds a few arrays of this size: on accelerators some 0.5 GiB each, on a CPU 48 MiB."""

_CPU_ROWS = 2**19
"""Logits of a group of rows on a CPU: two megabytes, which stay in a core's cache from
one operation of the objective to the next. Measured: forward KL at 1,024 x 256 x 32,000
takes 12% less time than with whole chunks."""


def _sizes(tokens: int, vocab: int, static: Static) -> tuple[int, int]:
    """Returns the tokens of a chunk, and of a group of its rows.

    Of so many tokens, and entries of the head, on a device.
    """

    def largest(entries: int) -> int:
        # Powers of two divide most batches.
        return 1 << max(entries // vocab, 1).bit_length() - 1

    chunk = static.chunk_size
    if chunk is None:
        # Of fewer tokens, a product spends its time on reading the head.
        chunk = max(largest(_ENTRIES.get(static.platform, _ENTRIES["gpu"])), 128)
    # Chunks of about one size.
    chunk = -(-tokens // -(-tokens // chunk))
    rows = largest(_CPU_ROWS) if static.platform == "cpu" else chunk
    return (chunk, rows) if rows >= chunk else (-(-chunk // rows) * rows, rows)


def sum_tokens(
    static: Static,
    wanted: Gradients,
    partition: Partition | None,
    moving: Moving,
    fixed: Fixed,
) -> Outcome:
    """Returns the sums over the tokens of one device; the heads are whole."""
    static = static._replace(partition=partition)
    hidden, vocab = moving.hidden, moving.head.axes[1]
    entries = width = moving.head.kernel.shape[vocab]
    for head in fixed.head.heads:
        if isinstance(head, Head):
            width = min(width, head.kernel.shape[head.axes[1]])

    def cut(head: Head, dtype: Any) -> Head:
        axis = head.axes[1]
        kernel = lax.slice_in_dim(head.kernel, 0, width, axis=axis).astype(dtype)
        bias = None if head.bias is None else head.bias[:width].astype(jnp.float32)
        kernel = spread_vocabulary(kernel, axis, partition)
        return dataclasses.replace(
            head, kernel=kernel, bias=bias, vocab_size=static.vocab_size
        )

    weight = token_weights(fixed.mask, hidden.shape[:-1], fixed.labels)
    tokens = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[weight.ndim :]),
        Tokens(hidden, fixed.teachers, weight, fixed.labels),
    )
    tensor = 1 if partition is None else partition.tensor
    chunk, rows = _sizes(weight.size, -(-width // tensor), static)
    problem = Problem(
        moving.objective,
        cut(moving.head, hidden.dtype),
        fixed.head.map_dense(lambda x, head: cut(head, x.dtype), fixed.teachers),
        wanted,
        static,
        parts=1 if width % tensor else tensor,
        rows=rows,
    )
    masked = fixed.mask is not None or fixed.labels is not None
    sums, in_hidden = _scan(problem, tokens, chunk, masked)
    if in_hidden is not None:
        in_hidden = in_hidden.reshape(hidden.shape)
    in_kernel, in_bias = sums.gradients.kernel, sums.gradients.bias
    if entries > width:
        rest = (0, entries - width)
        if in_kernel is not None:
            pads = [rest if axis == vocab else (0, 0) for axis in (0, 1)]
            in_kernel = jnp.pad(in_kernel, pads)
        in_bias = None if in_bias is None else jnp.pad(in_bias, rest)
    metrics = {"num_tokens": jnp.sum(weight), **sums.metrics}
    gradients = Gradients(sums.gradients.objective, in_hidden, in_kernel, in_bias)
    return Outcome(sums.loss, metrics, gradients)


def _scan(
    problem: Problem,
    tokens: Tokens,
    chunk: int,
    masked: bool,
) -> tuple[Outcome, Float[Array, "tokens d_student"] | None]:
    """Returns the sums over tokens, and the gradient of their hidden states.

    Args:
        problem: Objective and heads.
        tokens: At least one.
        chunk: Tokens of a chunk.
        masked: Whether weights of 0 are expected. Tokens that count are then brought
            together first, and a chunk that holds none does no work.
    """
    count = tokens.weight.size
    chunks = -(-count // chunk)
    live, order = jnp.int32(count), None
    if masked:
        order = jnp.argsort(tokens.weight == 0, stable=True).astype(jnp.int32)
        live = jnp.sum(tokens.weight != 0, dtype=jnp.int32)
        tokens = jax.tree.map(lambda x: jnp.take(x, order, axis=0), tokens)
        student, teacher = jax.tree.map(
            lambda x: select_tokens(x, tokens.weight), (tokens.student, tokens.teacher)
        )
        tokens = tokens._replace(student=student, teacher=teacher)

    def in_chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, chunks * chunk - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, chunk, *x.shape[1:])

    def work(sums: Outcome, part: Tokens) -> tuple[Outcome, Array | None]:
        return add_chunk(problem, sums, part)

    def body(sums: Outcome, x: tuple[Array, Tokens]) -> tuple[Outcome, Array | None]:
        start, part = x
        if not masked:
            return work(sums, part)
        nothing = jax.tree.map(
            lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(work, sums, part)[1]
        )

        def skip(sums: Outcome, _: Tokens) -> tuple[Outcome, Array | None]:
            return _touched(problem, sums), nothing

        return lax.cond(start < live, work, skip, sums, part)

    starts = chunk * jnp.arange(chunks, dtype=jnp.int32)
    sums, in_hidden = lax.scan(
        body, _zeros(problem), (starts, jax.tree.map(in_chunks, tokens))
    )
    if in_hidden is None:
        return sums, None
    if problem.parts > 1:
        in_hidden = jnp.sum(in_hidden, axis=1)
    in_hidden = in_hidden.reshape(chunks * chunk, -1)[:count]
    if order is not None:
        in_hidden = jnp.take(in_hidden, jnp.argsort(order), axis=0)
    return sums, in_hidden


def _touched(problem: Problem, sums: Outcome) -> Outcome:
    """Returns the same sums, of which the head's gradient seems to be another on a GPU.

    A branch that gives back what it was given makes XLA for GPUs copy it once in every
    chunk. One that writes into it, as the other branch does, has it in place.
    """
    kernel, axis = sums.gradients.kernel, problem.student.axes[0]
    if kernel is None or problem.static.platform != "gpu":
        return sums
    # Along d_model: the vocabulary may be spread.
    first = lax.slice_in_dim(kernel, 0, 1, axis=axis)
    kernel = lax.dynamic_update_slice_in_dim(kernel, first, 0, axis)
    return sums._replace(gradients=sums.gradients._replace(kernel=kernel))


def _zeros(problem: Problem) -> Outcome:
    """Returns the sums before the first chunk."""
    student, wanted, zero = problem.student, problem.wanted, jnp.float32(0)
    leaves, kernel = jax.tree.leaves(problem.objective), None
    vocab = student.kernel.shape[student.axes[1]]
    if wanted.kernel:
        kernel = jnp.zeros(student.kernel.shape, jnp.float32)
        kernel = spread_vocabulary(kernel, student.axes[1], problem.static.partition)
    smooth = [jnp.zeros_like(jnp.asarray(x)) for x in leaves if is_smooth(x)]
    gradients = Gradients(
        smooth if wanted.objective else None,
        None,
        kernel,
        jnp.zeros(vocab, jnp.float32) if wanted.bias else None,
    )
    sums: dict[str, Any] = dict.fromkeys(problem.static.metrics, zero)
    return Outcome(zero, sums, gradients)
