"""What of a teacher is stored: hidden states, or a few entries of each row."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32, Int, Shaped

from taid_jax.store.format import (
    LOGPROB_STEP,
    Column,
    example_key,
    hidden_columns,
    sampled_columns,
    topk_columns,
)
from taid_jax.types import Batch, Head, ModelFunctions, Params

DRAWS = "draws"
"""In a batch: a number in [0, 1) for each token, `(batch, length)` float32."""

_LEAST = 2**16 - 1
"""Stands for NaN: in no vocabulary has the most probable entry so little."""

_ENTRIES = 2**26
"""Logits that are built at once."""

Outputs = Callable[[Params, Batch], tuple[Array, ...]]
"""Gives the columns of a batch, `(batch, length, width)` each."""


def hidden_outputs(
    teacher: ModelFunctions, d_model: int, dtype: str
) -> tuple[tuple[Column, ...], Outputs]:
    """Returns the columns of hidden states, and what computes them."""

    def outputs(params: Params, batch: Batch) -> tuple[Array, ...]:
        return (_hidden(teacher, params, batch).astype(dtype),)

    return hidden_columns(d_model, dtype), outputs


def topk_outputs(
    teacher: ModelFunctions, vocab_size: int, k: int
) -> tuple[tuple[Column, ...], Outputs]:
    """Returns the columns of the `k` most probable ids, and what computes them."""
    columns = topk_columns(k, vocab_size)

    def rows(logits: Float[Array, "... vocab"], _: Array | None) -> tuple[Array, ...]:
        logprobs = jax.nn.log_softmax(logits)
        values, ids = lax.top_k(logprobs, k)
        # Of the others themselves: 1 - P would lose all digits of a small rest.
        # Not by its place: a slice makes XLA sort whole rows on a CPU, 50 times slower.
        lowest = jnp.min(values, axis=-1, keepdims=True)
        order = lax.broadcasted_iota(jnp.int32, logprobs.shape, logprobs.ndim - 1)
        last = jnp.max(jnp.where(values == lowest, ids, -1), axis=-1, keepdims=True)
        known = (logprobs > lowest) | ((logprobs == lowest) & (order <= last))
        tail = jax.nn.logsumexp(jnp.where(known, -jnp.inf, logprobs), axis=-1)
        return (
            ids.astype(columns[0].dtype),
            _fixed_point(values),
            _fixed_point(jnp.expand_dims(tail, -1)),
        )

    return columns, _by_rows(teacher, rows)


def sampled_outputs(
    teacher: ModelFunctions, vocab_size: int, draws: int
) -> tuple[tuple[Column, ...], Outputs]:
    """Returns the columns of ids drawn from the teacher, and what draws them.

    Systematic sampling: one number of a token shifts a comb of `draws` equal steps over
    the cumulated probabilities, so that an id with probability p is drawn `draws` p
    times on average, and never further than one from that.

    References:
        Anshumann et al., Sparse Logit Sampling, 2025 (arXiv:2503.16870): draws from the
        teacher in place of its most probable tokens.
    """
    columns = sampled_columns(draws, vocab_size)

    def rows(logits: Float[Array, "... vocab"], shift: Array) -> tuple[Array, ...]:
        cumulated = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
        cumulated /= cumulated[..., -1:]
        steps = jnp.arange(draws, dtype=jnp.float32).reshape(1, draws)
        comb = (steps + shift.reshape(-1, 1)) / draws
        flat = cumulated.reshape(-1, logits.shape[-1])
        ids = jax.vmap(lambda row, at: jnp.searchsorted(row, at, side="right"))(
            flat, comb
        )
        ids = jnp.minimum(ids, vocab_size - 1).astype(jnp.int32)
        ids, counts = jax.vmap(_count_runs)(ids)
        counts = jnp.where(jnp.isnan(flat[:, -1:]), 0, counts)
        unknown = jnp.uint32(columns[0].filler)
        ids = jnp.where(counts > 0, ids.astype(jnp.uint32), unknown)
        shape = (*logits.shape[:-1], draws)
        return (
            ids.reshape(shape).astype(columns[0].dtype),
            counts.reshape(shape).astype(jnp.uint16),
        )

    return columns, _by_rows(teacher, rows)


def draws_of(ids: Int[np.ndarray, " tokens"]) -> Float32[np.ndarray, " tokens"]:
    """Returns the numbers that an example's draws are made with: its own always."""
    seed = int.from_bytes(example_key(ids), "big")
    return np.random.Generator(np.random.Philox(key=seed)).random(len(ids), np.float32)


def is_finite(columns: Mapping[str, Shaped[np.ndarray, "tokens _"]]) -> bool:
    """Returns whether a teacher gave numbers for all tokens, not NaN for some."""
    if "teacher_hidden" in columns:
        return bool(np.isfinite(columns["teacher_hidden"]).all())
    if "teacher_counts" in columns:
        return bool((columns["teacher_counts"][:, 0] > 0).all())
    return bool((columns["teacher_logprobs"][:, 0] < _LEAST).all())


def _count_runs(ids: Int[Array, " n"]) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """Returns each of the rising numbers once, and how often it comes; then zeros."""
    size = ids.shape[0]
    place = jnp.arange(size, dtype=jnp.int32)
    first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    run = jnp.cumsum(first.astype(jnp.int32)) - 1
    counts = jnp.zeros(size, jnp.int32).at[run].add(1)
    starts = jnp.sort(jnp.where(first, place, size))
    found = jnp.where(starts < size, ids[jnp.minimum(starts, size - 1)], 0)
    return found, counts


def _fixed_point(logprobs: Float[Array, "..."]) -> Array:
    """Returns log-probabilities as `format.encode_logprobs` gives them; NaN as -inf."""
    steps = jnp.round(-logprobs.astype(jnp.float32) / LOGPROB_STEP)
    steps = jnp.where(jnp.isnan(steps), jnp.inf, steps)
    return jnp.clip(steps, 0, _LEAST).astype(jnp.uint16)


def _by_rows(
    teacher: ModelFunctions, rows: Callable[[Array, Array], tuple[Array, ...]]
) -> Outputs:
    """Returns what computes columns from rows of logits, a part of them at a time."""

    def outputs(params: Params, batch: Batch) -> tuple[Array, ...]:
        if teacher.head is None:
            raise ValueError("need a teacher with a head, got none")
        hidden, head = _hidden(teacher, params, batch), teacher.head(params)
        size, length = hidden.shape[:2]
        step = _part(length, size * head.kernel.shape[head.axes[1]])
        shift = jnp.asarray(batch.get(DRAWS, jnp.zeros((size, length), jnp.float32)))

        def pieces(x: Array) -> Array:
            # Along the sequence, as the rows are on several devices.
            return x.reshape(size, -1, step, *x.shape[2:]).swapaxes(0, 1)

        def one(piece: tuple[Array, Array]) -> tuple[Array, ...]:
            return rows(_logits(head, piece[0]), piece[1])

        found = lax.map(one, (pieces(hidden), pieces(shift)))
        return tuple(x.swapaxes(0, 1).reshape(size, length, -1) for x in found)

    return outputs


def _hidden(teacher: ModelFunctions, params: Params, batch: Batch) -> Array:
    if teacher.hidden is None:
        raise ValueError("need a teacher with hidden states, got logits alone")
    return teacher.hidden(params, batch)


def _logits(head: Head, hidden: Array) -> Array:
    """Returns the logits of the entries that count."""
    logits = head.logits(hidden)
    return logits if head.vocab_size is None else logits[..., : head.vocab_size]


def _part(length: int, entries: int) -> int:
    """Returns the largest divisor of a length of which so many entries fit."""
    most = max(1, _ENTRIES // entries)
    return max(n for n in range(1, min(length, most) + 1) if length % n == 0)
