import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.models.config import RopeConfig
from taid_jax.models.rope import rope_frequencies, rotate, rotation

LLAMA3 = RopeConfig(
    theta=500000.0,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_length=8192,
)


def test_rope_frequencies_are_the_powers_of_theta():
    frequencies = rope_frequencies(RopeConfig(theta=100.0), 4)
    np.testing.assert_allclose(frequencies, [1.0, 0.1], rtol=1e-7)


def test_rope_frequencies_linear_divides_all_by_the_factor():
    plain = rope_frequencies(RopeConfig(theta=100.0), 8)
    linear = rope_frequencies(RopeConfig(theta=100.0, kind="linear", factor=4.0), 8)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)


def test_rope_frequencies_llama3_divides_the_low_ones_only():
    plain = rope_frequencies(RopeConfig(theta=LLAMA3.theta), 128)
    scaled = rope_frequencies(LLAMA3, 128)
    turns = LLAMA3.original_max_length * plain / (2 * np.pi)
    # One float32 rounding of each side.
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rope_frequencies_llama3_are_those_of_transformers(theta):
    pytest.importorskip("torch", reason="transformers computes them with PyTorch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](settings, "cpu")
    rope = RopeConfig(theta, "llama3", 32.0, 1.0, 4.0, 512)
    # Their powers are taken in float32: an exponent's rounding times its logarithm.
    np.testing.assert_allclose(rope_frequencies(rope, 64), expected.numpy(), rtol=3e-6)


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
