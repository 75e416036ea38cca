import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.decoder import (
    abstract_params,
    head,
    hidden_states,
    init_params,
    param_axes,
    select_layers,
)

TINY = DecoderConfig(
    vocab_size=61,
    d_model=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=40,
    max_position_embeddings=64,
)
PATTERN = dataclasses.replace(
    TINY,
    window=4,
    window_layers=(True, False, True),
    local_rope=RopeConfig(theta=50.0),
    rope_layers=(True, True, False),
)
CONFIGS = {
    "grouped": TINY,
    "tied": dataclasses.replace(TINY, num_kv_heads=1, tie_embeddings=True),
    "pattern": PATTERN,
    "norms": dataclasses.replace(TINY, norm="layer_no_bias", norm_place="both"),
    "biases": dataclasses.replace(TINY, norm="layer", qkv_bias=True, head_bias=True),
    "more_biases": dataclasses.replace(TINY, attention_bias=True, mlp_bias=True),
    "no_gate": dataclasses.replace(TINY, gated_mlp=False, learned_positions=True),
    "one_norm": dataclasses.replace(TINY, residual="parallel_one_norm"),
    "after": dataclasses.replace(TINY, norm_place="after", qk_norm="projection"),
    "each_head": dataclasses.replace(TINY, qk_norm="each_head", norm="rms_plus_one"),
}
"""What families do, for the trees of parameters."""

LENGTH = 21


def tiny_params(config=TINY, dtype=np.float32):
    """Random parameters without compiling their initialisation."""
    rng = np.random.default_rng(0)

    def draw(shape):
        normal = rng.normal(size=shape.shape)
        spread = 0.2 * normal if len(shape.shape) > 2 else 1 + 0.1 * normal
        return jnp.asarray(spread, dtype)

    return jax.tree.map(draw, abstract_params(config))


@functools.partial(jax.jit, static_argnums=(2, 3))
def run_tiny(params, batch, config=TINY, dtype=jnp.float32):
    return hidden_states(params, batch, config, dtype=dtype)


def ids_of(config, batch=2, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, config.vocab_size, size=(batch, length)).astype(np.int32)


def as_batch(**arrays):
    return {name: jnp.asarray(array) for name, array in arrays.items()}


@pytest.mark.slow
def test_hidden_states_jitted_are_those_run_step_by_step():
    params, batch = tiny_params(), as_batch(input_ids=ids_of(TINY))
    with jax.disable_jit():
        eager = hidden_states(params, batch, TINY)
    # The compiler sums in another order.
    np.testing.assert_allclose(eager, run_tiny(params, batch), atol=2e-6)


def test_hidden_states_see_no_later_token():
    params = tiny_params()
    # Each token occurs once, so a row of the embedding is one position.
    ids = jnp.arange(1, 12, dtype=jnp.int32)[None]
    at = 6

    def middle(table):
        changed = {**params, "embed": {"embedding": table}}
        return (hidden_states(changed, {"input_ids": ids}, TINY)[0, at] ** 3).sum()

    gradient = jax.jit(jax.grad(middle))(params["embed"]["embedding"])
    reached = np.abs(gradient).max(axis=1)[np.asarray(ids[0])]
    assert (reached[: at + 1] > 0).all()
    assert (reached[at + 1 :] == 0).all()


def test_hidden_states_do_not_depend_on_padding():
    mask = np.ones((2, LENGTH), np.int32)
    mask[0, :5] = 0
    mask[1, -7:] = 0
    ids = ids_of(TINY)
    other = np.where(mask, ids, ids[::-1])

    @jax.jit
    def run(params, ids):
        batch = as_batch(input_ids=ids, attention_mask=mask)
        hidden = hidden_states(params, batch, TINY)
        return (hidden * mask[:, :, None].astype(np.float32)).sum(), hidden

    step = jax.value_and_grad(run, has_aux=True)
    params = tiny_params()
    (_, first), gradient = step(params, ids)
    (_, second), other_gradient = step(params, other)
    real = mask != 0
    np.testing.assert_array_equal(np.asarray(first)[real], np.asarray(second)[real])
    for part in ("layers", "final_norm"):
        jax.tree.map(
            np.testing.assert_array_equal, gradient[part], other_gradient[part]
        )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_hidden_states_of_bfloat16_stay_near_float32():
    params = tiny_params()
    batch = as_batch(input_ids=ids_of(TINY))
    exact = run_tiny(params, batch)
    rounded = run_tiny(params, batch, TINY, jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    # About twenty roundings to 8 bits of numbers of size 1, of which some add up.
    assert np.abs(rounded.astype(jnp.float32) - exact).max() < 0.06
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert run_tiny(half, batch).dtype == jnp.float32
    gradient = jax.eval_shape(
        jax.grad(
            lambda p: run_tiny(p, batch, TINY, jnp.bfloat16).mean(dtype=jnp.float32)
        ),
        params,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", ["grouped", "norms", "each_head"])
def test_hidden_states_with_rematerialisation_keep_less(name):
    config = CONFIGS[name]
    batch = as_batch(input_ids=ids_of(config))

    def kept(remat):
        def run(params):
            return hidden_states(params, batch, config, remat=remat)

        pull = jax.eval_shape(lambda p: jax.vjp(run, p)[1], abstract_params(config))
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept("none") > kept("dots") > kept("full")


def test_hidden_states_with_rematerialisation_have_the_same_gradient():
    batch, params = as_batch(input_ids=ids_of(TINY)), tiny_params()

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(params, remat):
        return jnp.sin(hidden_states(params, batch, TINY, remat=remat)).sum()

    # The same products again, in another order of sums.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
        gradient(params, "full"),
        gradient(params, "none"),
    )


def test_hidden_states_are_the_same_however_many_layers_a_turn_has():
    batch, params = as_batch(input_ids=ids_of(TINY)), tiny_params()
    expected = hidden_states(params, batch, TINY)
    for unroll in (2, 3, 4):  # There are three.
        found = hidden_states(params, batch, TINY, unroll=unroll)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_hidden_states_program_does_not_grow_with_the_layers():
    def size(num_layers):
        layers = tuple(index % 3 > 0 for index in range(num_layers))
        config = dataclasses.replace(
            TINY,
            num_layers=num_layers,
            window=4,
            window_layers=layers,
            local_rope=RopeConfig(theta=5.0),
        )
        params = abstract_params(config)
        batch = {"input_ids": jax.ShapeDtypeStruct((2, LENGTH), "int32")}

        def loss(params, batch):
            return hidden_states(params, batch, config).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params, batch).compile()
        return len(compiled.as_text().splitlines())

    # The numbers in it are longer, and some fusions differ; nothing is repeated.
    assert size(30) < 1.02 * size(4)


@pytest.mark.parametrize("name", CONFIGS)
def test_param_axes_name_every_axis_of_the_parameters(name):
    config = CONFIGS[name]
    params = abstract_params(config, jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.d_model,
        "norm": config.d_model,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_dim,
        "positions": config.max_position_embeddings,
    }
    jax.tree.map(
        lambda leaf, axes: leaf.shape == tuple(sizes[axis] for axis in axes) or 1 / 0,
        params,
        param_axes(config),
    )
    assert ("lm_head" in params) != config.tie_embeddings


def test_init_params_are_independent_normals_of_the_asked_size():
    config = dataclasses.replace(TINY, d_model=128, mlp_dim=256, initializer_range=0.05)
    params = init_params(config, jax.random.key(0))
    up = params["layers"]["mlp"]["up_proj"]["kernel"]
    gate = params["layers"]["mlp"]["gate_proj"]["kernel"]
    # The deviation of 32,768 normals is known to 0.4%; three of those.
    np.testing.assert_allclose(up.std(axis=(1, 2)), 0.05, rtol=0.012)
    for first, second in ((up[0], up[1]), (up[0], gate[0])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    assert (params["final_norm"]["scale"] == 1).all()


@pytest.mark.parametrize(
    ("kept", "expected"),
    [(1, [0]), (2, [0, 29]), (4, [0, 10, 19, 29]), (30, list(range(30)))],
)
def test_select_layers_keeps_the_first_the_last_and_even_spaces(kept, expected):
    config = dataclasses.replace(TINY, num_layers=30)
    params = {"layers": {"scale": jnp.arange(30)}, "final_norm": {"scale": jnp.ones(3)}}
    chosen, shallow = select_layers(params, config, kept)
    np.testing.assert_array_equal(chosen["layers"]["scale"], expected)
    assert shallow == dataclasses.replace(config, num_layers=kept)
    assert chosen["final_norm"] is params["final_norm"]


def test_decoder_refuses_what_cannot_be_done():
    config, batch = CONFIGS["no_gate"], as_batch(input_ids=ids_of(TINY, length=65))
    params = tiny_params(config)
    with pytest.raises(ModelError, match=r"65 tokens is too long: .* learned 64"):
        hidden_states(params, batch, config)
    with pytest.raises(ModelError, match=r"need one of .*full.*, got 'some'"):
        hidden_states(params, batch, TINY, remat="some")
    for number in (0, 4):
        with pytest.raises(ModelError, match=f"need 1 to 3.*got {number}"):
            select_layers(params, config, number)


def test_hidden_states_with_learned_positions_count_from_the_first_token():
    config = CONFIGS["no_gate"]
    params, ids = tiny_params(config), ids_of(config, batch=1, length=6)
    alone = run_tiny(params, as_batch(input_ids=ids), config)
    padded = as_batch(
        input_ids=np.pad(ids, ((0, 0), (3, 0))),
        attention_mask=np.pad(np.ones_like(ids), ((0, 0), (3, 0))),
    )
    # The same sums with three zeros more.
    np.testing.assert_allclose(
        run_tiny(params, padded, config)[:, 3:], alone, atol=1e-5
    )


def test_head_has_the_kernel_the_bias_and_the_cap_of_the_model():
    config = dataclasses.replace(CONFIGS["biases"], head_softcap=2.0)
    params = tiny_params(config)
    last = head(params, config)
    assert last.kernel is params["lm_head"]["kernel"]
    assert last.bias is params["lm_head"]["bias"]
    assert last.softcap == 2.0
    tied = dataclasses.replace(TINY, tie_embeddings=True, head_softcap=3.0)
    params = tiny_params(tied)
    found = head(params, tied)
    assert found.kernel is params["embed"]["embedding"]
    assert (found.softcap, found.transposed) == (3.0, True)
    padded = dataclasses.replace(config, vocab_size=40, padded_vocab_size=61)
    hidden = jnp.ones((1, 2, config.d_model))
    logits = head(tiny_params(config), padded).logits(hidden)
    np.testing.assert_array_equal(logits[..., 40:], -np.inf)
    np.testing.assert_array_equal(logits[..., :40], last.logits(hidden)[..., :40])
