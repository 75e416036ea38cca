import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.rope import layer_rotations, rope_frequencies, rotate, rotation


def test_rope_frequencies_are_the_powers_of_theta():
    frequencies = rope_frequencies(RopeConfig(theta=100.0), 4)
    np.testing.assert_allclose(frequencies, [1.0, 0.1], rtol=1e-7)


def test_rope_frequencies_linear_divides_all_by_the_factor():
    plain = rope_frequencies(RopeConfig(theta=100.0), 8)
    linear = rope_frequencies(RopeConfig(theta=100.0, kind="linear", factor=4.0), 8)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)


def test_rotate_keeps_lengths_and_sees_distances_only():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 16)), "float32") for _ in "qk")
    rope = RopeConfig(theta=100.0)

    def score(at, other):
        turned = [
            rotate(x[:, None], rotation(jnp.full((1, 1), where), rope, 16))
            for x, where in ((query, at), (key, other))
        ]
        return float((turned[0] * turned[1]).sum())

    turned = rotate(query[:, None], rotation(jnp.full((1, 1), 7), rope, 16))
    # Rounding of a sum of 16 squares near 16.
    np.testing.assert_allclose((turned**2).sum(), (query**2).sum(), rtol=1e-6)
    # Angles up to 1000 radians carry an error of 6e-5 in float32.
    assert score(3, 0) == pytest.approx(score(1003, 1000), abs=2e-3)
    assert abs(score(3, 0) - score(4, 0)) > 1e-2


def test_rotate_of_bfloat16_turns_in_float32():
    rng = np.random.default_rng(1)
    heads = jnp.asarray(rng.normal(size=(1, 2, 3, 50, 8)), jnp.bfloat16)
    turn = rotation(jnp.arange(50)[None], RopeConfig(), 8)
    exact = rotate(heads.astype(jnp.float32), turn)
    turned = rotate(heads, turn)
    assert turned.dtype == jnp.bfloat16
    # Half a unit in the last place of the 8 bits: one rounding, at the end.
    np.testing.assert_allclose(
        turned.astype(jnp.float32), exact, rtol=2**-8, atol=1e-30
    )


def torch_frequencies(kind, rope, *, head_dim=64, length=None, context=512):
    """Frequencies and scale that transformers derives."""
    pytest.importorskip("torch", reason="transformers computes them with PyTorch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=context,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, **rope},
    )
    expected, scale = ROPE_INIT_FUNCTIONS[kind](settings, "cpu", seq_len=length)
    return expected.numpy(), scale


def test_rope_frequencies_llama3_are_those_of_transformers():
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    expected, _ = torch_frequencies("llama3", scaling)
    rope = RopeConfig(1e4, "llama3", 32.0, 1.0, 4.0, 512)
    # Their powers are taken in float32: an exponent's rounding times its logarithm.
    np.testing.assert_allclose(rope_frequencies(rope, 64), expected, rtol=3e-6)


@pytest.mark.parametrize(
    ("original", "fast", "slow", "truncate"),
    [(4096, 32.0, 1.0, True), (4096, 4.0, 0.01, False)],
)
def test_rope_frequencies_yarn_are_those_of_transformers(
    original, fast, slow, truncate
):
    expected, scale = torch_frequencies(
        "yarn",
        {
            "factor": 8.0,
            "original_max_position_embeddings": original,
            "beta_fast": fast,
            "beta_slow": slow,
            "truncate": truncate,
        },
    )
    rope = RopeConfig(
        kind="yarn",
        factor=8.0,
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
        attention_factor=scale,
    )
    # Their powers are taken in float32.
    np.testing.assert_allclose(rope_frequencies(rope, 64), expected, rtol=3e-6)
    cos, sin = rotation(jnp.array([[0, 3]]), rope, 64)
    np.testing.assert_allclose(cos[0, 0], np.full(32, scale), rtol=1e-6)
    np.testing.assert_allclose(sin[0, 1], scale * np.sin(3 * expected), atol=1e-5)


@pytest.mark.parametrize("length", [512, 1500])
def test_rotation_dynamic_is_that_of_transformers(length):
    expected, _ = torch_frequencies("dynamic", {"factor": 2.0}, length=length)
    rope = RopeConfig(kind="dynamic", factor=2.0, original_max_position_embeddings=512)
    cos, _ = rotation(jnp.array([[1, length - 1]]), rope, 64)
    np.testing.assert_allclose(cos[0, 0], np.cos(expected), atol=1e-6)


@pytest.mark.parametrize("length", [16, 17])
def test_rotation_longrope_takes_the_factors_of_the_longest_sequence(length):
    short, long = [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 5.0, 9.0]
    factors = {"short_factor": short, "long_factor": long}
    expected, scale = torch_frequencies(
        "longrope",
        {**factors, "original_max_position_embeddings": 16},
        head_dim=8,
        length=length,
        context=64,
    )
    rope = RopeConfig(
        kind="longrope",
        original_max_position_embeddings=16,
        short_factor=tuple(short),
        long_factor=tuple(long),
        attention_factor=scale,
    )
    cos, _ = rotation(jnp.array([[1, 2], [0, length - 1]]), rope, 8)
    np.testing.assert_allclose(cos[0, 0], scale * np.cos(expected), rtol=1e-5)


def test_rotate_turns_the_first_part_of_partial_heads_only():
    heads = jnp.asarray(np.random.default_rng(2).normal(size=(1, 1, 2, 5, 12)), "f4")
    rope = RopeConfig(partial_rotary_factor=0.5)
    turned = rotate(heads, rotation(jnp.arange(5)[None], rope, 12))
    whole = rotation(jnp.arange(5)[None], RopeConfig(), 6)
    np.testing.assert_array_equal(turned[..., :6], rotate(heads[..., :6], whole))
    np.testing.assert_array_equal(turned[..., 6:], heads[..., 6:])


def layers_of(**changes):
    sizes = dict.fromkeys(
        ("vocab_size", "d_model", "mlp_dim", "max_position_embeddings"), 8
    )
    heads = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    return DecoderConfig(num_layers=3, **sizes, **heads, **changes)


def test_layer_rotations_are_stacked_where_layers_differ():
    positions, other = jnp.arange(4)[None], RopeConfig(theta=5.0)
    config = layers_of(
        window=2,
        window_layers=(True, False, True),
        local_rope=other,
        rope_layers=(True, True, False),
    )
    turns, index = layer_rotations(positions, config)
    np.testing.assert_array_equal(index, [0, 1, 2])
    for kind, rope in enumerate((other, RopeConfig())):
        for got, part in zip(turns, rotation(positions, rope, 8), strict=True):
            np.testing.assert_array_equal(got[kind], part)
    heads = jnp.ones((1, 1, 4, 8))
    still = [part[2] for part in turns]
    np.testing.assert_array_equal(rotate(heads, tuple(still)), heads)
