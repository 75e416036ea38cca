import pytest

from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.errors import ModelError

SIZES = {
    "vocab_size": 50,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "mlp_dim": 40,
    "max_length": 64,
}


def test_decoder_config_is_a_key_of_compiled_functions():
    first, second = DecoderConfig(**SIZES), DecoderConfig(**SIZES)
    assert hash(first) == hash(second)
    assert first == second
    assert first != DecoderConfig(**{**SIZES, "rope": RopeConfig(theta=5.0)})


@pytest.mark.parametrize("name", SIZES)
def test_decoder_config_refuses_sizes_below_one(name):
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
        ({"kind": "llama3", "original_max_length": 0}, "original_max_length >= 1"),
    ],
)
def test_rope_config_refuses_what_is_out_of_range(changes, message):
    with pytest.raises(ModelError, match=message):
        RopeConfig(**changes)
