import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from taid_jax.models import kernels as kernels
from taid_jax.models.attention import Scoring, causal_attention
from taid_jax.sharding import activations_on, make_mesh

LENGTH = 128


def _arrays(head_dim, kv_heads=2, batch=2):
    rng = np.random.default_rng(head_dim)
    shapes = (
        (batch, kv_heads, 3, LENGTH, head_dim),
        *2 * ((batch, kv_heads, LENGTH, head_dim),),
    )
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    segments = np.sort(rng.integers(0, 3, (batch, LENGTH)), axis=1)
    return arrays, jnp.asarray(segments, jnp.int32)


def _value_and_gradients(attention, arrays):
    def loss(*arrays):
        out = attention(*arrays)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, out), gradients = jax.jit(run)(*arrays)
    return [np.asarray(array, np.float32) for array in (out, *gradients)]


@pytest.mark.parametrize(
    ("head_dim", "window", "softcap"),
    [
        pytest.param(64, None, None, marks=pytest.mark.optimised),
        pytest.param(128, 100, 30.0, marks=pytest.mark.slow),
    ],
)
def test_splash_attention_is_causal_attention(head_dim, window, softcap):
    arrays, segments = _arrays(head_dim)
    options = {"window": window, "scoring": Scoring(head_dim**-0.5, softcap)}
    ours = _value_and_gradients(
        functools.partial(causal_attention, segments=segments, **options), arrays
    )
    theirs = _value_and_gradients(
        functools.partial(
            kernels.splash_attention, segments=segments, interpret=True, **options
        ),
        arrays,
    )
    for a, b in zip(theirs, ours, strict=True):
        # Both round to 8 bits in several places: 2^-7 of the largest.
        np.testing.assert_allclose(a, b, atol=2**-7 * np.abs(b).max())


@pytest.mark.multidevice
def test_splash_attention_on_a_mesh_is_that_on_one_device():
    arrays, segments = _arrays(64, batch=4)
    options = {"window": None, "scoring": Scoring(0.125), "interpret": True}
    attention = functools.partial(kernels.splash_attention, **options)
    expected = jax.jit(attention)(*arrays, segments)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    where = jax.NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
    placed = [jax.device_put(array, where) for array in arrays]
    segments = jax.device_put(segments, jax.NamedSharding(mesh, P(("data", "fsdp"))))
    found = jax.jit(functools.partial(attention, mesh=mesh))(*placed, segments)
    np.testing.assert_array_equal(expected, found)


@pytest.fixture
def chosen(monkeypatch):
    """The names of the kernels that `attend` takes for shapes on a platform."""

    def choose(platform, length=256, head_dim=64, dtype=jnp.bfloat16, **options):
        taken = []

        def stand_in(name):
            def kernel(queries, keys, values, segments, **options):
                taken.append(name)
                return queries

            return kernel

        monkeypatch.setattr(kernels, "_platform", lambda mesh: platform)
        for name in ("splash_attention", "cudnn_attention", "causal_attention"):
            monkeypatch.setattr(kernels, name, stand_in(name))
        queries = jax.ShapeDtypeStruct((8, 2, 3, length, head_dim), dtype)
        keys = jax.ShapeDtypeStruct((8, 2, length, head_dim), dtype)
        segments = jax.ShapeDtypeStruct((8, length), jnp.int32)
        mesh = options.pop("mesh", "fsdp=8")
        options = {"window": None, "scoring": Scoring(0.125)} | options
        with activations_on(None if mesh is None else make_mesh(mesh)):
            attend = functools.partial(kernels.attend, **options)
            jax.eval_shape(attend, queries, keys, keys, segments)
        return "+".join(name.removesuffix("_attention") for name in taken)

    return choose


@pytest.mark.multidevice
def test_attend_takes_the_platforms_kernel_where_it_fits(chosen):
    assert chosen("cpu") == "causal"
    assert chosen("tpu") == "splash"
    assert chosen("gpu") == "cudnn"
    for platform in ("tpu", "gpu"):
        assert chosen(platform, dtype=jnp.float32) == "causal"
    # Blocks of a TPU's kernel are multiples of its 128 lanes.
    assert chosen("tpu", length=200) == "causal"
    # One key head for each two devices of `tensor`, or nobody who says how arrays lie.
    assert chosen("tpu", mesh="tensor=4,data=2") == "causal"
    assert chosen("tpu", mesh=None) == "causal"
    capped = Scoring(0.125, 30.0)
    assert chosen("tpu", scoring=capped) == "splash"
    assert chosen("gpu", scoring=capped) == "causal"
    assert chosen("gpu", head_dim=256) == "causal"
    assert chosen("gpu", length=8192) == "causal"
    # JAX refuses it under a gradient.
    assert chosen("gpu", length=255) == "causal"
    # Layers with and without a window in one program: both are in it.
    mixed = {"window": jnp.int32(100), "size": 100}
    assert chosen("gpu", **mixed) == "cudnn+cudnn"
    assert chosen("tpu", **mixed) == "splash+splash"


@pytest.mark.multidevice
def test_attention_without_the_platforms_kernel_is_said_once(chosen, caplog):
    kernels._log_once.cache_clear()
    chosen("cpu")
    chosen("gpu")
    assert not caplog.messages
    for _ in range(2):
        chosen("gpu", head_dim=512)
        chosen("tpu", mesh="tensor=4,data=2")
    assert len(caplog.messages) == 2
    assert "heads of 512: need a multiple of 8, at most 128" in caplog.messages[0]
    assert "8 rows and 2 heads of keys do not go over" in caplog.messages[1]


def test_layers_with_and_without_a_window_share_a_program(monkeypatch):
    arrays, segments = _arrays(64)
    splash = functools.partial(kernels.splash_attention, interpret=True)
    monkeypatch.setattr(kernels, "splash_attention", splash)
    monkeypatch.setattr(kernels, "_platform", lambda mesh: "tpu")
    monkeypatch.setattr(kernels, "_not_splash", lambda queries, mesh: None)
    scoring = Scoring(0.125)
    whole = int(jnp.iinfo(jnp.int32).max)
    attend = jax.jit(functools.partial(kernels.attend, scoring=scoring, size=20))
    # A segment has some 40 tokens.
    for window, of_layer in ((20, 20), (None, whole)):
        options = {"window": window, "scoring": scoring}
        expected = causal_attention(*arrays, segments, **options)
        found = attend(*arrays, segments, window=jnp.int32(of_layer))
        difference = np.abs(np.asarray(expected - found, np.float32))
        # Both round to 8 bits; with the other window it is more than 1.
        assert difference.max() < 2**-4, window


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_attention_can_be_lowered_for_a_gpu(window, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    # No CUDA here: JAX asks for the version before it writes the call down.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91500)
    arrays, segments = _arrays(64)

    def loss(*arrays):
        options = {"window": window, "scoring": Scoring(0.125)}
        out = kernels.cudnn_attention(*arrays, segments, **options)
        return jnp.sum(out.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text or "__cudnn$fmhaScaleBiasSoftmax" in text
    assert "Backward" in text


@pytest.mark.tpu_compiler
def test_splash_attention_needs_memory_that_does_not_grow_with_the_square():
    from taid_jax.plan import find_machine
    from taid_jax.plan.compiled import compiled_anew

    pytest.importorskip("libtpu", reason="compiles for a TPU")
    (device,) = find_machine("v5e:1x1").devices
    where = jax.sharding.SingleDeviceSharding(device)

    def temp_bytes(length):
        def struct(*shape, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        def loss(queries, keys, values, segments):
            out = kernels.splash_attention(
                *(queries, keys, values, segments),
                window=None,
                scoring=Scoring(0.125),
            )
            return jnp.sum(out.astype(jnp.float32))

        keys = struct(1, 2, length, 64)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        lowered = gradient.lower(
            *(struct(1, 2, 4, length, 64), keys, keys),
            struct(1, length, dtype=jnp.int32),
        )
        with compiled_anew():
            compiled = lowered.compile()
        return compiled.memory_analysis().temp_size_in_bytes

    found = {length: temp_bytes(length) for length in (2048, 4096, 8192)}
    # Twice the length, at most twice the memory and a little; the square of 8,192 for
    # eight heads would be 2 GiB in float32.
    assert found[4096] <= 2.2 * found[2048]
    assert found[8192] <= 2.2 * found[4096]
    assert found[8192] < 2**27


def test_hidden_states_keep_what_a_kernel_gave_where_asked(monkeypatch):
    from taid_jax.models.config import DecoderConfig
    from taid_jax.models.decoder import abstract_params, hidden_states
    from taid_jax.plan import count_flops

    config = DecoderConfig(
        vocab_size=8,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=16,
        max_position_embeddings=256,
    )
    monkeypatch.setattr(kernels, "_platform", lambda mesh: "tpu")
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def flops(remat):
        def loss(params, ids):
            batch = {"input_ids": ids}
            with activations_on(make_mesh("data=1", jax.devices()[:1])):
                out = hidden_states(
                    params, batch, config, dtype=jnp.bfloat16, remat=remat
                )
            return jnp.sum(out.astype(jnp.float32))

        return count_flops(jax.make_jaxpr(jax.grad(loss))(abstract_params(config), ids))

    # Two layers, four heads, one block of 128 by 128, two products of eight numbers.
    forward = 2 * 4 * 2 * (2 * 128 * 128 * 8)
    assert flops("dots") - flops("none") == forward
    assert flops("full") > flops("dots")
