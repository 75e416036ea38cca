"""Causal attention whose backward pass keeps no (length, length) array."""

import functools
import itertools
import math
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
    scalar = config.head_dim if config.query_scalar is None else config.query_scalar
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
    from the scores' log-sum instead of keeping them.

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
    if scoring is None:
        scoring = Scoring(1 / math.sqrt(queries.shape[-1]))
    fixed, traced = (window, None) if isinstance(window, int) else (None, window)
    return _attention((scoring, fixed), queries, keys, values, segments, traced)


Static = tuple[Scoring, int | None]
Masks = tuple[Segments, Int[Array, ""] | None]


def _blocks(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """Returns the blocks of queries, each with the keys that its queries may see.

    Without a window these are the keys up to the block's own end: four blocks leave
    five eighths of the whole square to compute; more make the products smaller without
    gain, until the square of a long sequence would not fit in memory.
    """
    count = max(1, min(length // 64, 4), min(length // 256, 16))
    edges = [length * index // count for index in range(count + 1)]
    return [
        (slice(start, stop), slice(max(0, start + 1 - (window or length)), stop))
        for start, stop in itertools.pairwise(edges)
    ]


def _visible(
    rows: slice, seen: slice, masks: Masks, window: int | None
) -> Bool[Array, "batch 1 1 rows keys"]:
    """Returns which of the seen keys each query of a block sees."""
    segments, traced = masks
    query = jnp.arange(rows.start, rows.stop, dtype=jnp.int32)[:, None]
    distance = query - jnp.arange(seen.start, seen.stop, dtype=jnp.int32)[None]
    visible = distance >= 0
    if traced is not None:
        visible &= distance < traced
    elif window is not None:
        visible &= distance < window
    visible = visible[None]
    if segments is not None:
        visible = visible & (segments[:, rows, None] == segments[:, None, seen])
    return visible[:, None, None]


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, queries, keys, values, segments, window):
    return _forward(static, queries, keys, values, segments, window)[0]


def _forward(static: Static, queries, keys, values, segments, window):
    attended, log_sums = [], []
    scoring, fixed = static
    for rows, seen in _blocks(queries.shape[3], fixed):
        scores = key_scores(queries[:, :, :, rows], keys[:, :, seen], scoring)
        visible = _visible(rows, seen, (segments, window), fixed)
        scores = jnp.where(jnp.broadcast_to(visible, scores.shape), scores, _MASKED)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        mixed = _product(
            "bkgqm,bkmh->bkgqh", weights.astype(values.dtype), values[:, :, seen]
        )
        attended.append((mixed / total).astype(queries.dtype))
        log_sums.append(top + jnp.log(total))
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
    for rows, seen in _blocks(queries.shape[3], fixed):
        block = gradient[:, :, :, rows]
        scores = key_scores(queries[:, :, :, rows], keys[:, :, seen], static[0])
        visible = _visible(rows, seen, (segments, window), fixed)
        visible = jnp.broadcast_to(visible, scores.shape)
        shown = jnp.where(visible, scores, _MASKED)
        weights = jnp.exp(shown - log_sum[:, :, :, rows])
        by_weight = _product("bkgqh,bkmh->bkgqm", block, values[:, :, seen])
        by_score = weights * (by_weight - inner[:, :, :, rows])
        if softcap is not None:
            by_score *= 1 - jnp.square(scores / softcap)
        by_score = (by_score * scale).astype(dtype)
        rest = ((0, 0), (0, 0), (seen.start, keys.shape[2] - seen.stop), (0, 0))
        by_query.append(_product("bkgqm,bkmh->bkgqh", by_score, keys[:, :, seen]))
        by_key += jnp.pad(
            _product("bkgqm,bkgqh->bkmh", by_score, queries[:, :, :, rows]), rest
        )
        by_value += jnp.pad(
            _product("bkgqm,bkgqh->bkmh", weights.astype(dtype), block), rest
        )
    by_query = jnp.concatenate(by_query, axis=3).astype(dtype)
    return by_query, by_key.astype(dtype), by_value.astype(dtype), None, None


_attention.defvjp(_forward, _backward)
