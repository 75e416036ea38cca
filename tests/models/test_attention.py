import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.models import attention as attention_module
from taid_jax.models.attention import (
    Scoring,
    batch_positions,
    batch_segments,
    causal_attention,
)


def reference(queries, keys, values, segments=None, window=None, scoring=None):
    """The definition, written with whole squares."""
    length = queries.shape[3]
    scoring = scoring or Scoring(queries.shape[-1] ** -0.5)
    scores = jnp.einsum("bkgqh,bkmh->bkgqm", queries, keys) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = ((distance >= 0) & (distance < (window or length)))[None, None, None]
    if segments is not None:
        same = segments[:, :, None] == segments[:, None]
        visible = jnp.asarray(visible) & same[:, None, None]
    scores = jnp.where(jnp.broadcast_to(visible, scores.shape), scores, -jnp.inf)
    return jnp.einsum("bkgqm,bkmh->bkgqh", jax.nn.softmax(scores, axis=-1), values)


def draw(length, batch=2, kv_heads=2, group=3, head_dim=8, dtype="float32", scale=1.0):
    rng = np.random.default_rng(length)
    shapes = [(batch, kv_heads, group, length, head_dim)]
    shapes += [(batch, kv_heads, length, head_dim)] * 2
    return [jnp.asarray(scale * rng.normal(size=shape), dtype) for shape in shapes]


def some_segments(length, batch=2):
    rng = np.random.default_rng(length + 1)
    return jnp.asarray(np.sort(rng.integers(0, 3, size=(batch, length)), axis=1))


def value_and_gradients(attention, arrays):
    """The attended values, and gradients of a sum with weights."""
    weights = np.random.default_rng(9).normal(size=arrays[0].shape)

    @jax.jit
    def run(*arrays):
        def loss(*arrays):
            attended = attention(*arrays)
            return (attended * jnp.asarray(weights, "float32")).sum(), attended

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    gradients, attended = run(*arrays)
    return attended, *gradients


@pytest.mark.parametrize(
    ("length", "packed", "window", "softcap", "traced"),
    [
        (1, False, None, None, False),
        (130, False, None, None, False),
        (17, True, 1, None, False),
        (130, True, 5, 2.0, True),
        pytest.param(257, True, 100, 0.5, False, marks=pytest.mark.optimised),
    ],
)
def test_causal_attention_is_the_definition(length, packed, window, softcap, traced):
    arrays, scoring = draw(length), Scoring(0.3, softcap)
    segments = some_segments(length) if packed else None
    seen = jnp.int32(window) if traced else window
    ours = functools.partial(
        causal_attention, segments=segments, window=seen, scoring=scoring
    )
    theirs = functools.partial(
        reference, segments=segments, window=window, scoring=scoring
    )
    # Sums of up to 257 float32 numbers of size 1 to 4.
    for mine, other in zip(
        value_and_gradients(ours, arrays),
        value_and_gradients(theirs, arrays),
        strict=True,
    ):
        np.testing.assert_allclose(mine, other, atol=4e-5)


def test_causal_attention_in_pieces_is_that_in_one(monkeypatch):
    length, window = 300, 40
    arrays = draw(length)
    place = jnp.arange(length, dtype=jnp.int32)[None]
    segments = 1 + (place >= 70).astype(jnp.int32) + (place >= 155).astype(jnp.int32)
    segments = jnp.broadcast_to(segments, (2, length))
    attention = functools.partial(causal_attention, segments=segments, window=window)
    whole = value_and_gradients(attention, arrays)
    monkeypatch.setattr(attention_module, "_PIECE", 16)
    blocks = attention_module._blocks(length, window)
    assert max(rows.stop - rows.start for rows, _ in blocks) >= 3 * 16
    assert blocks[-1][0].stop == length
    # The same products in another order of float32 sums of up to 300 terms.
    for a, b in zip(whole, value_and_gradients(attention, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def temp_bytes(length):
    """Memory beside arguments and results of attention and its gradient."""
    queries = jax.ShapeDtypeStruct((1, 1, 1, length, 16), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, 1, length, 16), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(queries, keys, values, segments):
        out = causal_attention(queries, keys, values, segments)
        return jnp.sum(out.astype(jnp.float32))

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = program.lower(queries, keys, keys, segments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.optimised
def test_causal_attention_memory_grows_with_the_length(monkeypatch):
    monkeypatch.setattr(attention_module, "_PIECE", 16)
    # Twice the length: twice the memory. With the square it would be four times.
    assert temp_bytes(512) < 2.4 * temp_bytes(256)


@pytest.mark.slow
@pytest.mark.optimised
def test_causal_attention_memory_of_long_sequences_grows_with_the_length():
    assert temp_bytes(32768) < 2.4 * temp_bytes(16384)


def test_causal_attention_of_enormous_scores_is_finite():
    queries, keys, values = draw(9)
    arrays = 1e4 * queries, 1e4 * keys, values
    attended, *gradients = value_and_gradients(causal_attention, arrays)
    np.testing.assert_allclose(attended, reference(*arrays), atol=1e-5)
    assert all(np.isfinite(part).all() for part in gradients)


def test_causal_attention_of_bfloat16_sums_in_float32():
    arrays = draw(64, dtype=jnp.bfloat16)
    wide = [array.astype(jnp.float32) for array in arrays]
    attended = jax.jit(causal_attention)(*arrays)
    assert attended.dtype == jnp.bfloat16
    # Weights and the result are rounded to 8 bits once each; values reach 4.
    np.testing.assert_allclose(
        attended.astype(jnp.float32), reference(*wide), atol=4 * 2**-8
    )


def test_causal_attention_keeps_nothing_that_grows_with_the_square():
    arrays = draw(257, head_dim=8)
    pull = jax.eval_shape(lambda *a: jax.vjp(causal_attention, *a)[1], *arrays)
    kept = jax.tree.leaves(pull)
    assert max(leaf.size for leaf in kept) <= arrays[0].size


def test_batch_segments_makes_padding_a_segment_of_its_own():
    mask = jnp.asarray([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert batch_segments({"input_ids": mask}) is None
    np.testing.assert_array_equal(
        batch_segments({"attention_mask": mask}), [[-1, -1, 1, 1], [1, 1, 1, -1]]
    )
    segments = jnp.asarray([[0, 0, 1, 1], [1, 2, 2, 0]])
    np.testing.assert_array_equal(batch_segments({"segment_ids": segments}), segments)
    np.testing.assert_array_equal(
        batch_segments({"segment_ids": segments, "attention_mask": mask}),
        [[-1, -1, 1, 1], [1, 2, 2, -1]],
    )


def test_batch_positions_counts_from_the_first_real_token():
    ids = jnp.zeros((2, 4), jnp.int32)
    mask = jnp.asarray([[0, 0, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(batch_positions({"input_ids": ids}), [[0, 1, 2, 3]])
    positions = batch_positions({"input_ids": ids, "attention_mask": mask})
    np.testing.assert_array_equal(positions, [[0, 0, 0, 1], [0, 1, 2, 2]])
    given = {"input_ids": ids, "attention_mask": mask, "positions": mask}
    np.testing.assert_array_equal(batch_positions(given), mask)


def test_causal_attention_skips_keys_before_a_plain_window():
    def products(window):
        arrays = draw(256)
        run = jax.jit(lambda *a: causal_attention(*a, window=window))
        return run.lower(*arrays).compile().cost_analysis()["flops"]

    # Four blocks of 64 queries see 64, 128, 192 and 256 keys; with a window of 8 the
    # last three see 71.
    assert products(8) < 0.55 * products(None)
    assert products(256) == products(None)
