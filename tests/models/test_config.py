import pytest

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig, RopeConfig

SIZES = {
    "vocab_size": 50,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "mlp_dim": 40,
    "max_position_embeddings": 64,
}


def test_decoder_config_refuses_sizes_below_one():
    for name in SIZES:
        with pytest.raises(ModelError, match=f"{name} >= 1, got 0"):
            DecoderConfig(**{**SIZES, name: 0})


def test_decoder_config_lists_everything_that_is_wrong():
    wrong = {
        "num_kv_heads": 3,
        "head_dim": 7,
        "norm_eps": 0.0,
        "initializer_range": -1.0,
        "mlp_dim": -2,
    }
    with pytest.raises(ModelError) as raised:
        DecoderConfig(**{**SIZES, **wrong})
    message = str(raised.value)
    for part in (
        "divides num_heads, got 3 and 4",
        "even head_dim",
        "got 7",
        "norm_eps > 0",
        "initializer_range > 0",
        "mlp_dim >= 1, got -2",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "spiral"}, "longrope, llama3, got spiral"),
        ({"theta": 0.0}, "theta > 0, got 0.0"),
        ({"kind": "linear", "factor": 0.5}, "factor >= 1, got 0.5"),
        (
            {"kind": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "low_freq_factor < high_freq_factor, got 4.0 and 1.0",
        ),
        (
            {"kind": "llama3", "original_max_position_embeddings": 0},
            "original_max_position_embeddings >= 1",
        ),
        ({"partial_rotary_factor": 0.0}, "0 < partial_rotary_factor <= 1, got 0.0"),
        ({"attention_factor": 0.0}, "attention_factor > 0"),
        ({"kind": "yarn", "beta_slow": 40.0}, "0 < beta_slow <= beta_fast.*40.0, 32.0"),
        ({"kind": "longrope", "long_factor": (1.0, 0.0)}, "long_factor > 0, got 0.0"),
    ],
)
def test_rope_config_refuses_what_is_out_of_range(changes, message):
    with pytest.raises(ModelError, match=message):
        RopeConfig(**changes)


LONG = RopeConfig(kind="longrope", short_factor=(1.0,), long_factor=(1.0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch"}, "norm one of rms, .*, got batch"),
        ({"activation": "tanh"}, "activation one of silu, .*, got tanh"),
        ({"window": 0}, "window > 0, got 0"),
        ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar > 0, got -1"),
        ({"head_softcap": 0.0}, "head_softcap > 0, got 0.0"),
        ({"window": 4, "window_layers": (True,)}, "2 window_layers, one for .* got 1"),
        ({"rope_layers": (True,) * 3}, "2 rope_layers, one for a layer, got 3"),
        ({"window_layers": (True, False)}, "window where window_layers are given"),
        ({"rope": None, "rope_layers": (True, True)}, "rope where"),
        (
            {"window": 4, "local_rope": RopeConfig(partial_rotary_factor=0.5)},
            "same partial_rotary_factor, got 0.5 and 1.0",
        ),
        ({"norm_place": "both", "residual": "parallel"}, "norms before the sublayers"),
        ({"tie_embeddings": True, "head_bias": True}, "a head of its own"),
        (
            {"rope": RopeConfig(partial_rotary_factor=0.5)},
            "got 6, of which 3 are rotated",
        ),
        ({"rope": LONG}, "3 rope short_factor, one for a pair, got 1"),
        ({"head_dim": 2, "rope": RopeConfig(kind="dynamic")}, "more than one rotary"),
    ],
)
def test_decoder_config_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ModelError, match=message):
        DecoderConfig(**{**SIZES, **changes})


def test_decoder_config_says_what_each_layer_sees_and_how_it_turns():
    local = RopeConfig(theta=5.0)
    config = DecoderConfig(**SIZES, window=3, window_layers=(False, True))
    assert config.windows == (None, 3)
    assert config.ropes == (RopeConfig(),) * 2
    config = DecoderConfig(
        **SIZES,
        window=3,
        window_layers=(False, True),
        local_rope=local,
        rope_layers=(False, True),
    )
    assert config.ropes == (None, local)
    assert DecoderConfig(**SIZES, window=3).windows == (3, 3)
    # A head that is turned in part may have any width.
    odd = {**SIZES, "head_dim": 9, "rope": RopeConfig(partial_rotary_factor=0.5)}
    assert DecoderConfig(**odd).rope is not None
