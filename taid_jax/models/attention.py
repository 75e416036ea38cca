"""Causal attention whose backward pass keeps no (length, length) array."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Float32, Int

from taid_jax.types import Batch

Queries = Float[Array, "batch kv_heads group length head_dim"]
Keys = Float[Array, "batch kv_heads length head_dim"]
Segments = Int[Array, "batch length"] | None

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


def causal_attention(
    queries: Queries, keys: Keys, values: Keys, segments: Segments = None
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
    """
    return _attention(queries, keys, values, segments)


def _blocks(length: int) -> list[slice]:
    """Returns the blocks of queries: each takes only the keys up to its own end.

    Four leave five eighths of the whole square to compute; more make the products
    smaller without gain, until the square of a long sequence would not fit in memory.
    """
    count = max(1, min(length // 64, 4), min(length // 256, 16))
    edges = [length * index // count for index in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def _visible(rows: slice, segments: Segments) -> Bool[Array, "batch 1 1 rows keys"]:
    """Returns which keys, up to the block's end, each query of a block sees."""
    query = jnp.arange(rows.start, rows.stop)[:, None]
    key = jnp.arange(rows.stop)[None]
    visible = (query >= key)[None]
    if segments is not None:
        mine, theirs = segments[:, rows, None], segments[:, None, : rows.stop]
        visible = visible & (mine == theirs)
    return visible[:, None, None]


def _scores(
    queries: Queries, keys: Keys, segments: Segments, rows: slice
) -> Float32[Array, "batch kv_heads group rows keys"]:
    """Returns the scaled scores of a block of queries, hidden keys masked."""
    scores = _product(
        "bkgqh,bkmh->bkgqm", queries[:, :, :, rows], keys[:, :, : rows.stop]
    )
    scores = scores * (1 / math.sqrt(queries.shape[-1]))
    visible = jnp.broadcast_to(_visible(rows, segments), scores.shape)
    return jnp.where(visible, scores, _MASKED)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attention(queries, keys, values, segments):
    return _forward(queries, keys, values, segments)[0]


def _forward(queries, keys, values, segments):
    attended, log_sums = [], []
    for rows in _blocks(queries.shape[3]):
        scores = _scores(queries, keys, segments, rows)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        mixed = _product(
            "bkgqm,bkmh->bkgqh",
            weights.astype(values.dtype),
            values[:, :, : rows.stop],
        )
        attended.append((mixed / total).astype(queries.dtype))
        log_sums.append(top + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(attended, axis=3), "attended")
    log_sum = checkpoint_name(jnp.concatenate(log_sums, axis=3), "attended")
    return out, (queries, keys, values, segments, out, log_sum)


def _backward(kept, gradient):
    queries, keys, values, segments, out, log_sum = kept
    dtype = queries.dtype
    inner = gradient.astype(jnp.float32) * out.astype(jnp.float32)
    inner = inner.sum(axis=-1, keepdims=True)
    by_query = []
    by_key = by_value = jnp.zeros(keys.shape, jnp.float32)
    for rows in _blocks(queries.shape[3]):
        block, seen = gradient[:, :, :, rows], slice(rows.stop)
        weights = jnp.exp(
            _scores(queries, keys, segments, rows) - log_sum[:, :, :, rows]
        )
        by_weight = _product("bkgqh,bkmh->bkgqm", block, values[:, :, seen])
        by_score = weights * (by_weight - inner[:, :, :, rows])
        by_score = (by_score * (1 / math.sqrt(queries.shape[-1]))).astype(dtype)
        rest = ((0, 0), (0, 0), (0, keys.shape[2] - rows.stop), (0, 0))
        by_query.append(_product("bkgqm,bkmh->bkgqh", by_score, keys[:, :, seen]))
        by_key += jnp.pad(
            _product("bkgqm,bkgqh->bkmh", by_score, queries[:, :, :, rows]), rest
        )
        by_value += jnp.pad(
            _product("bkgqm,bkgqh->bkmh", weights.astype(dtype), block), rest
        )
    by_query = jnp.concatenate(by_query, axis=3).astype(dtype)
    return by_query, by_key.astype(dtype), by_value.astype(dtype), None


_attention.defvjp(_forward, _backward)
