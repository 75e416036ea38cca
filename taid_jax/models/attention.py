"""Causal attention whose backward pass keeps no (length, length) array."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Float32, Int

from taid_jax.models.config import DecoderConfig
from taid_jax.types import Batch

Queries = Float[Array, "batch kv_heads group length head_dim"]
Keys = Float[Array, "batch kv_heads length head_dim"]
Segments = Int[Array, "batch length"] | None
Window = int | Int[Array, ""] | None
"""Tokens that a token sees, itself included; all when None. Traced where layers that
share a program differ: then hidden keys are masked only, not skipped."""

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a hidden key. Finite, so that a row without any stays finite too."""


def batch_segments(batch: Batch) -> Segments:
    """Returns the segment of every token: tokens see their own segment alone.

    Padding is a segment of its own, so that no real token sees it. None when the batch
    is neither packed nor padded.
    """
    segments = batch.get("segment_ids", batch.get("attention_mask"))
    if segments is None:
        return None
    segments = jnp.asarray(segments)
    if "attention_mask" in batch:
        real = jnp.asarray(batch["attention_mask"]) != 0
        segments = jnp.where(real, segments, jnp.full_like(segments, -1))
    return segments


def batch_positions(batch: Batch) -> Int[Array, "rows length"]:
    """Returns the position of every token; one row where all sequences share it.

    `positions` of the batch; else counted from the first token that is not padding.
    """
    if "positions" in batch:
        return jnp.asarray(batch["positions"])
    if "attention_mask" in batch:
        seen = jnp.cumsum(batch["attention_mask"], axis=1, dtype=jnp.int32)
        return jnp.maximum(seen - 1, 0)
    return jnp.arange(batch["input_ids"].shape[1], dtype=jnp.int32)[None]


class Scoring(NamedTuple):
    """How the scores are made of the products of queries and keys.

    Attributes:
        scale: Multiplies them.
        softcap: They become `softcap * tanh(scaled / softcap)` when not None.
    """

    scale: float
    softcap: float | None = None


def scoring_of(config: DecoderConfig) -> Scoring:
    """Returns how a decoder scores its keys."""
    scalar = config.query_pre_attn_scalar
    if scalar is None:
        scalar = config.head_dim
    return Scoring(1 / math.sqrt(scalar), config.attention_softcap)


def key_scores(
    queries: Float[Array, "batch kv_heads group queries head_dim"],
    keys: Float[Array, "batch kv_heads keys head_dim"],
    scoring: Scoring,
) -> Float32[Array, "batch kv_heads group queries keys"]:
    """Returns the score of every key for every query, none hidden."""
    scores = _product("bkgqh,bkmh->bkgqm", queries, keys) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    return scores


def causal_attention(
    queries: Queries,
    keys: Keys,
    values: Keys,
    segments: Segments = None,
    *,
    window: Window = None,
    scoring: Scoring | None = None,
) -> Queries:
    """Returns the attended values: a token sees its segment up to itself.

    Softmax and sums are float32. The backward pass computes the probabilities again
    from the scores' log-sum instead of keeping them. Memory grows with the length, not
    with its square.

    Args:
        queries: `(batch, kv_heads, group, length, head_dim)`; query heads that share a
            key head lie in one group.
        keys: `(batch, kv_heads, length, head_dim)`.
        values: Same shape.
        segments: `(batch, length)`; all one segment when None.
        window: Tokens that a token sees; keys that no query of a block sees are
            skipped where it is a plain number.
        scoring: How products become scores; divided by the root of `head_dim` when
            None.
    """
    scoring = scoring or Scoring(1 / math.sqrt(queries.shape[-1]))
    fixed, traced = (window, None) if isinstance(window, int) else (None, window)
    if fixed is not None and fixed >= queries.shape[3]:
        fixed = None
    return _attention((scoring, fixed), queries, keys, values, segments, traced)


Static = tuple[Scoring, int | None]
Masks = tuple[Segments, Int[Array, ""] | None]


_PIECE = 512
"""Queries of one piece of a block: more of them against all keys of a long sequence
would need memory that grows with the square of its length."""


def _blocks(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """Returns the blocks of queries, each with the keys that its queries may see.

    Four blocks leave five eighths of the whole square to compute; more make the
    products smaller without gain, until the square of a long sequence would not fit in
    memory. A block of more than a piece has whole ones; the rest is a block too.
    """
    count = max(1, min(length // 64, 4), min(length // 256, 16))
    edges = [length * index // count for index in range(count + 1)]
    if length > count * _PIECE:
        pieces = [edge // _PIECE for edge in edges]
        edges = [piece * _PIECE for piece in pieces]
        edges += [length] if length % _PIECE else []
    return [
        (slice(start, stop), slice(max(0, start + 1 - (window or length)), stop))
        for start, stop in itertools.pairwise(edges)
    ]


class _Rows(NamedTuple):
    """What belongs to a block of queries; `place` is theirs in the sequence."""

    place: Int[Array, "rows"]
    segments: Segments
    arrays: tuple[Float[Array, "batch kv_heads group rows width"], ...]

    def pieces(self, count: int) -> "_Rows":
        """Returns the same with a leading axis of pieces everywhere."""

        def cut(array: Array, axis: int) -> Array:
            shape = array.shape
            shape = (*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :])
            return jnp.moveaxis(array.reshape(shape), axis, 0)

        return _Rows(
            cut(self.place, 0),
            None if self.segments is None else cut(self.segments, 1),
            tuple(cut(array, 3) for array in self.arrays),
        )


def _take_rows(rows: slice, segments: Segments, *arrays: Array) -> _Rows:
    place = jnp.arange(rows.start, rows.stop, dtype=jnp.int32)
    segments = None if segments is None else segments[:, rows]
    return _Rows(place, segments, tuple(array[:, :, :, rows] for array in arrays))


Carry = tuple[Array, ...]
Work = Callable[[Carry, _Rows], tuple[Carry, tuple[Array, ...]]]


def _by_piece(work: Work, carry: Carry, rows: _Rows) -> tuple[Carry, tuple[Array, ...]]:
    """Returns what `work` gives for a block, piece by piece when it is large.

    The arrays that it gives have the rows on axis 3.
    """
    count = rows.place.size // _PIECE
    if count <= 1:
        return work(carry, rows)
    carry, arrays = jax.lax.scan(work, carry, rows.pieces(count))

    def join(array: Array) -> Array:
        array = jnp.moveaxis(array, 0, 3)
        shape = array.shape
        return array.reshape(*shape[:3], shape[3] * shape[4], *shape[5:])

    return carry, tuple(join(array) for array in arrays)


def _visible(
    rows: _Rows, seen: slice, masks: Masks, window: int | None
) -> Bool[Array, "batch 1 1 rows keys"]:
    """Returns which of the seen keys each query of a block sees."""
    segments, traced = masks
    keys = jnp.arange(seen.start, seen.stop, dtype=jnp.int32)
    distance = rows.place[:, None] - keys[None]
    visible = distance >= 0
    if traced is not None:
        visible &= distance < traced
    elif window is not None:
        visible &= distance < window
    visible = visible[None]
    if segments is not None and rows.segments is not None:
        visible = visible & (rows.segments[:, :, None] == segments[:, None, seen])
    return visible[:, None, None]


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, queries, keys, values, segments, window):
    return _forward(static, queries, keys, values, segments, window)[0]


def _forward(static: Static, queries, keys, values, segments, window):
    attended, log_sums = [], []
    scoring, fixed = static
    for block, seen in _blocks(queries.shape[3], fixed):

        def work(carry, rows, seen=seen):
            scores = key_scores(rows.arrays[0], keys[:, :, seen], scoring)
            visible = _visible(rows, seen, (segments, window), fixed)
            scores = jnp.where(jnp.broadcast_to(visible, scores.shape), scores, _MASKED)
            top = scores.max(axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            mixed = _product(
                "bkgqm,bkmh->bkgqh", weights.astype(values.dtype), values[:, :, seen]
            )
            out = (mixed / total).astype(queries.dtype)
            return carry, (out, top + jnp.log(total))

        _, (out, log_sum) = _by_piece(work, (), _take_rows(block, segments, queries))
        attended.append(out)
        log_sums.append(log_sum)
    out = checkpoint_name(jnp.concatenate(attended, axis=3), "attended")
    log_sum = checkpoint_name(jnp.concatenate(log_sums, axis=3), "attended")
    return out, (queries, keys, values, segments, window, out, log_sum)


def _backward(static: Static, kept, gradient):
    queries, keys, values, segments, window, out, log_sum = kept
    (scale, softcap), fixed = static
    dtype = queries.dtype
    inner = gradient.astype(jnp.float32) * out.astype(jnp.float32)
    inner = inner.sum(axis=-1, keepdims=True)
    by_query = []
    by_key = by_value = jnp.zeros(keys.shape, jnp.float32)
    for block, seen in _blocks(queries.shape[3], fixed):

        def work(carry, rows, seen=seen):
            mine, wanted, log_sums, inner = rows.arrays
            scores = key_scores(mine, keys[:, :, seen], static[0])
            visible = _visible(rows, seen, (segments, window), fixed)
            visible = jnp.broadcast_to(visible, scores.shape)
            shown = jnp.where(visible, scores, _MASKED)
            weights = jnp.exp(shown - log_sums)
            by_weight = _product("bkgqh,bkmh->bkgqm", wanted, values[:, :, seen])
            by_score = weights * (by_weight - inner)
            if softcap is not None:
                by_score *= 1 - jnp.square(scores / softcap)
            by_score = (by_score * scale).astype(dtype)
            carry = (
                carry[0] + _product("bkgqm,bkgqh->bkmh", by_score, mine),
                carry[1] + _product("bkgqm,bkgqh->bkmh", weights.astype(dtype), wanted),
            )
            query = _product("bkgqm,bkmh->bkgqh", by_score, keys[:, :, seen])
            return carry, (query.astype(dtype),)

        zero = jnp.zeros(keys[:, :, seen].shape, jnp.float32)
        rows = _take_rows(block, segments, queries, gradient, log_sum, inner)
        (key, value), (query,) = _by_piece(work, (zero, zero), rows)
        rest = ((0, 0), (0, 0), (seen.start, keys.shape[2] - seen.stop), (0, 0))
        by_query.append(query)
        by_key += jnp.pad(key, rest)
        by_value += jnp.pad(value, rest)
    by_query = jnp.concatenate(by_query, axis=3)
    return by_query, by_key.astype(dtype), by_value.astype(dtype), None, None


_attention.defvjp(_forward, _backward)
