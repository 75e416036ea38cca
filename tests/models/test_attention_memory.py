import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.models import attention as at

pytestmark = pytest.mark.optimised


def _arrays(length, *, head_dim=8, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (1, 2, 2, length, head_dim), *2 * ((1, 2, length, head_dim),)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _value_and_gradients(arrays, segments, **options):
    def loss(*arrays):
        out = at.causal_attention(*arrays, segments, **options)
        return jnp.sum(jnp.sin(out)), out

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, out), gradients = jax.jit(run)(*arrays)
    return out, *gradients


@pytest.mark.parametrize(("length", "window"), [(256, None), (300, 40)])
def test_causal_attention_in_pieces_is_that_in_one(length, window, monkeypatch):
    arrays = _arrays(length)
    place = jnp.arange(length, dtype=jnp.int32)[None]
    segments = 1 + (place >= 70).astype(jnp.int32) + (place >= 155).astype(jnp.int32)
    whole = _value_and_gradients(arrays, segments, window=window)
    monkeypatch.setattr(at, "_PIECE", 16)
    blocks = at._blocks(length, window)
    assert max(rows.stop - rows.start for rows, _ in blocks) >= 3 * 16
    assert blocks[-1][0].stop == length
    pieces = _value_and_gradients(arrays, segments, window=window)
    # The same products in another order of float32 sums of up to 300 terms.
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def _temp_bytes(length, device=None, heads=(1, 1), head_dim=16):
    """Memory beside arguments and results of attention and its gradient."""
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    struct = functools.partial(
        jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=sharding
    )
    queries = struct((1, *heads, length, head_dim))
    keys = struct((1, heads[0], length, head_dim))
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding)

    def loss(queries, keys, values, segments):
        out = at.causal_attention(queries, keys, values, segments)
        return jnp.sum(out.astype(jnp.float32))

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = program.lower(queries, keys, keys, segments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_causal_attention_memory_grows_with_the_length():
    found = [_temp_bytes(length) for length in (16384, 32768)]
    # Twice the length: twice the memory. With the square it would be four times.
    assert found[1] < 2.4 * found[0]
