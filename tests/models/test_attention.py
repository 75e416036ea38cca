import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.models.attention import (
    Scoring,
    batch_positions,
    batch_segments,
    causal_attention,
)

pytestmark = pytest.mark.optimised


def reference(queries, keys, values, segments=None):
    """The definition, written with whole squares."""
    length = queries.shape[3]
    scores = jnp.einsum("bkgqh,bkmh->bkgqm", queries, keys) * queries.shape[-1] ** -0.5
    visible = jnp.tril(jnp.ones((1, 1, 1, length, length), bool))
    if segments is not None:
        visible &= (segments[:, :, None] == segments[:, None])[:, None, None]
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


@pytest.mark.parametrize("length", [1, 2, 3, 17, 130, 257])
@pytest.mark.parametrize("packed", [False, True])
def test_causal_attention_is_the_definition(length, packed):
    arrays = draw(length, scale=2.0)
    segments = some_segments(length) if packed else None
    attended = causal_attention(*arrays, segments)
    # Scores reach 50: their rounding, 4e-6, is the relative error of a weight.
    np.testing.assert_allclose(attended, reference(*arrays, segments), atol=2e-5)


@pytest.mark.parametrize("length", [1, 3, 130, 257])
@pytest.mark.parametrize("packed", [False, True])
def test_causal_attention_gradient_is_the_definition_s(length, packed):
    arrays = draw(length)
    segments = some_segments(length) if packed else None
    weights = jnp.asarray(
        np.random.default_rng(9).normal(size=arrays[0].shape), "float32"
    )

    def loss(function):
        return lambda *arrays: (function(*arrays, segments) * weights).sum()

    ours = jax.grad(loss(causal_attention), argnums=(0, 1, 2))(*arrays)
    theirs = jax.grad(loss(reference), argnums=(0, 1, 2))(*arrays)
    for mine, other in zip(ours, theirs, strict=True):
        # As above, summed over 3 query heads and up to 257 positions.
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_causal_attention_of_enormous_scores_is_finite():
    queries, keys, values = draw(9)
    attended, pull = jax.vjp(causal_attention, 1e4 * queries, 1e4 * keys, values)
    np.testing.assert_allclose(
        attended, reference(1e4 * queries, 1e4 * keys, values), atol=1e-5
    )
    assert all(np.isfinite(part).all() for part in pull(attended))


def test_causal_attention_of_bfloat16_sums_in_float32():
    arrays = draw(64, dtype=jnp.bfloat16)
    wide = [array.astype(jnp.float32) for array in arrays]
    attended = causal_attention(*arrays)
    assert attended.dtype == jnp.bfloat16
    # Weights and the result are rounded to 8 bits once each; values reach 4.
    np.testing.assert_allclose(
        attended.astype(jnp.float32), reference(*wide), atol=4 * 2**-8
    )


def test_causal_attention_keeps_nothing_that_grows_with_the_square():
    arrays = draw(257, head_dim=8)
    kept = jax.tree.leaves(jax.vjp(causal_attention, *arrays)[1])
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


def with_window(queries, keys, values, window, scoring, segments=None):
    """The definition with a window and a cap, written with whole squares."""
    length = queries.shape[3]
    scores = jnp.einsum("bkgqh,bkmh->bkgqm", queries, keys) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = ((distance >= 0) & (distance < window))[None, None, None]
    if segments is not None:
        same = np.asarray(segments[:, :, None] == segments[:, None])
        visible = visible & same[:, None, None]
    scores = jnp.where(jnp.broadcast_to(visible, scores.shape), scores, -jnp.inf)
    return jnp.einsum("bkgqm,bkmh->bkgqh", jax.nn.softmax(scores, axis=-1), values)


@pytest.mark.parametrize(
    ("length", "window", "softcap", "traced"),
    [
        (17, 1, None, False),
        (130, 5, 2.0, True),
        (130, 64, None, False),
        (257, 100, 0.5, False),
        (17, 17, 1.0, True),
    ],
)
def test_causal_attention_with_window_and_cap_is_the_definition(
    length, window, softcap, traced
):
    arrays, scoring = draw(length), Scoring(0.3, softcap)
    segments = some_segments(length)
    weights = np.random.default_rng(9).normal(size=arrays[0].shape)
    weights = jnp.asarray(weights, "float32")

    @jax.jit
    def ours(window, *arrays):
        def loss(*arrays):
            attended = causal_attention(
                *arrays, segments, window=window, scoring=scoring
            )
            return (attended * weights).sum(), attended

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    def theirs(*arrays):
        attended = with_window(*arrays, window, scoring, segments)
        return (attended * weights).sum(), attended

    if traced:
        gradient, attended = ours(jnp.int32(window), *arrays)
    else:
        gradient, attended = jax.jit(lambda *a: ours.__wrapped__(window, *a))(*arrays)
    expected, exact = jax.grad(theirs, argnums=(0, 1, 2), has_aux=True)(*arrays)
    # Sums of up to 257 float32 numbers of size 1 to 4.
    np.testing.assert_allclose(attended, exact, atol=2e-5)
    for mine, other in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=4e-5)


def test_causal_attention_skips_keys_before_a_plain_window():
    def products(window):
        arrays = draw(256)
        run = jax.jit(lambda *a: causal_attention(*a, window=window))
        return run.lower(*arrays).compile().cost_analysis()["flops"]

    # Four blocks of 64 queries see 64, 128, 192 and 256 keys; with a window of 8 the
    # last three see 71.
    assert products(8) < 0.55 * products(None)
    assert products(256) == products(None)
