import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.families import read_config
from taid_jax.models.rope import layer_rotations, rope_frequencies, rotate, rotation


def test_rope_frequencies_are_the_powers_of_theta():
    frequencies = rope_frequencies(RopeConfig(theta=100.0), 4)
    np.testing.assert_allclose(frequencies, [1.0, 0.1], rtol=1e-7)
    linear = rope_frequencies(RopeConfig(theta=100.0, kind="linear", factor=4.0), 4)
    np.testing.assert_allclose(linear, frequencies / 4, rtol=1e-6)


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


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 2.0, 3.0, 4.0],
    "long_factor": [2.0, 3.0, 5.0, 9.0],
}


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (LLAMA3, 100),
        (YARN, 100),
        ({**YARN, "beta_fast": 4.0, "beta_slow": 0.01, "truncate": False}, 100),
        # Within the original context and beyond it.
        *((DYNAMIC, 512), (DYNAMIC, 1500), (LONG, 16), (LONG, 17)),
    ],
)
def test_rotation_is_that_of_transformers(rope, length):
    pytest.importorskip("torch", reason="transformers computes them with PyTorch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head_dim = 8 if rope is LONG else 64  # LongRoPE has a factor for each pair.
    sizes = {
        "vocab_size": 8,
        "hidden_size": 4 * head_dim,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rope_parameters": {**rope, "rope_theta": 1e4},
    }
    derive = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    expected, scale = derive(transformers.LlamaConfig(**sizes), "cpu", seq_len=length)
    ours = read_config({"model_type": "llama", **sizes}, "sizes").rope
    assert ours is not None
    if rope["rope_type"] in ("llama3", "yarn"):
        # Their powers are taken in float32.
        np.testing.assert_allclose(
            rope_frequencies(ours, head_dim), expected, rtol=3e-6
        )
    # The longest sequence of the batch counts.
    cos, sin = rotation(jnp.array([[1, 3], [0, length - 1]]), ours, head_dim)
    np.testing.assert_allclose(cos[1, 0], np.full(head_dim // 2, scale), rtol=1e-6)
    for row, place, position in ((0, 0, 1), (0, 1, 3), (1, 1, length - 1)):
        angles = position * expected.numpy().astype(np.float64)
        # Angles of up to 1,500 radians, whose powers are taken in float32.
        options = {"atol": 1e-6 * position}
        np.testing.assert_allclose(cos[row, place], scale * np.cos(angles), **options)
        np.testing.assert_allclose(sin[row, place], scale * np.sin(angles), **options)


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
