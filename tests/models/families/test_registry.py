"""config.json to DecoderConfig and back; tables of weights that fit the decoder."""

import math

import jax
import pytest

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.decoder import abstract_params
from taid_jax.models.families import (
    FAMILIES,
    read_config,
)
from taid_jax.models.files.entries import axis_sizes, entries

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama(settings, **changes):
    base = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return {**base, **settings, **changes}


def problem(values):
    with pytest.raises(ModelError) as caught:
        read_config(values, "config.json")
    return str(caught.value)


@pytest.mark.parametrize(
    "style",
    [
        {"rope_parameters": LLAMA3},
        {
            "rope_scaling": {**LLAMA3, "type": "llama3"},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1.0},
        },
    ],
    ids=["mixed", "both"],
)
def test_read_config_reads_rope_in_every_style(tiny_settings, style):
    values = llama(tiny_settings, rope_theta=5e5, **style)
    expected = {key: value for key, value in LLAMA3.items() if key != "rope_type"}
    found = read_config(values, "config.json").rope
    assert found == RopeConfig(theta=5e5, kind="llama3", **expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_type.*spiral"),
        ({"rope_scaling": {"type": "linear"}}, "factor: is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor >= 1"),
        ({"rope_scaling": {**LLAMA3, "beta": 1}}, "rope_scaling.beta"),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, "rope_parameters.full"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"attention_bias": "yes"}, "attention_bias: need true or false"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: need at most"),
        ({"vocab_size": None}, "vocab_size: is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised.*gptq"),
    ],
)
def test_read_config_names_what_cannot_be_done(tiny_settings, changes, words):
    with pytest.raises(ModelError, match=words):
        read_config(llama(tiny_settings, **changes), "config.json")


@pytest.mark.parametrize("missing", ["architectures", "model_type"])
def test_read_config_needs_only_one_of_class_and_type(tiny_settings, missing):
    values = llama(tiny_settings)
    del values[missing]
    assert read_config(values, "config.json").family == "llama"


INERT = {
    "is_llama_config": True,
    "rope_interleaved": False,
    "attention_dropout": 0.1,
    "eos_token_id": [1, 2],
    "use_mrope": False,
    "max_sequence_length": 256,
    "tokenizer_padding_side": "left",
    "neftune_noise_alpha": 5.0,
    "pretraining_tp": 1,
    "loss_type": "ForCausalLM",
    "num_experts": 0,
    "router_aux_loss_coef": 0.0,
    "mtp_layers": [],
    "quantization_config": {},
    "vision_config": None,
    "rope_interleave_kind": "",
    "residual_multiplier": 1.0,
    "auto_map": {"AutoConfig": "configuration_x.Config"},
    "_attn_implementation_autoset": True,
    "unsloth_fixed": True,
    "is_causal": True,
}


def test_read_config_takes_keys_at_values_that_switch_nothing_on(tiny_settings):
    plain = read_config(llama(tiny_settings), "config.json")
    assert read_config(llama(tiny_settings, **INERT), "config.json") == plain
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    scaled = [
        read_config(llama(tiny_settings, rope_scaling={**yarn, **more}), "config.json")
        for more in ({}, {"finetuned": True, "extra": False, "another": None})
    ]
    assert scaled[0] == scaled[1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", 8),
        ("strange", [0]),
        ("strange", {"a": False}),
        ("strange", 1e-9),
    ],
)
def test_read_config_refuses_other_keys_and_names_the_flag(tiny_settings, key, value):
    values = llama(tiny_settings, **{key: value})
    text = problem(values)
    assert f"{key}: is not a setting that the decoder knows" in text
    assert "--allow-unknown-keys loads the model in spite of that" in text
    unknown = []
    plain = read_config(llama(tiny_settings), "config.json")
    assert read_config(values, "config.json", unknown=unknown) == plain
    assert unknown == [key]


def test_read_config_names_unknown_keys_of_sections(tiny_settings):
    scaling = {"type": "linear", "factor": 2.0, "mrope_section": [1, 1]}
    values = llama(tiny_settings, rope_scaling=scaling, **{"a\x1b[2J" * 200: 1})
    text = problem(values)
    assert "rope_scaling.mrope_section: is not a setting of 'linear'" in text
    assert len(text) < 600
    assert "\x1b" not in text
    unknown = []
    read_config(values, "config.json", unknown=unknown)
    assert unknown[0] == "rope_scaling.mrope_section"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_causal", False),
        ("is_causal", 1),
        ("residual_multiplier", 0.0),
        ("is_encoder_decoder", True),
    ],
)
def test_read_config_refuses_what_it_knows_to_matter(tiny_settings, key, value):
    # With the flag too: it is for what nobody knows.
    with pytest.raises(ModelError, match=key):
        read_config(llama(tiny_settings, **{key: value}), "config.json", unknown=[])


@pytest.mark.parametrize(
    "named",
    [
        {"architectures": {"a": "LlamaForCausalLM"}},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
        {"architectures": [], "model_type": None},
        {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]},
        {"architectures": ["x" * 10_000]},
        {"model_type": ["llama"]},
        {"model_type": "qwen2"},
        {"model_type": None, "auto_map": {"AutoConfig": "x.Config"}},
    ],
)
def test_read_config_refuses_names_that_do_not_fit(tiny_settings, named):
    text = problem({**llama(tiny_settings), **named})
    assert "need a list with one supported name" in text
    assert "supported are: LlamaForCausalLM (llama)" in text
    assert len(text) < 1500


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e-300},
        {"rope_theta": 1e-30},
        {"rms_norm_eps": 1e-300},
        {"initializer_range": 1e-46},
        {"rope_scaling": {"type": "yarn", "factor": 0.0}},
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": math.exp(10),
                "mscale": 1.0,
                "mscale_all_dim": -1.0,
            }
        },
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 5e-324}},
        {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1e-300, 1.0],
                "long_factor": [1.0, 1.0],
            }
        },
        {"hidden_size": 10**400},
        {"head_dim": 0, "num_attention_heads": 0, "num_key_value_heads": 0},
        {"rms_norm_eps": "x" * 10_000},
    ],
)
def test_read_config_refuses_numbers_that_cannot_be_computed_with(
    tiny_settings, changes
):
    text = problem(llama(tiny_settings, **changes))
    assert "config.json" in text
    assert len(text) < 600


FILES = [
    pytest.param(family, file_format, id=f"{family.name}-{file_format}")
    for family in FAMILIES
    for file_format in (["hf"] if family.gguf is None else ["hf", "gguf"])
]


@pytest.mark.parametrize(("family", "file_format"), FILES)
def test_layouts_of_every_weight_give_the_decoders_shapes(family, file_format):
    settings = {
        "vocab_size": 11,
        "d_model": 6,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_dim": 10,
        "max_position_embeddings": 32,
        "attention_bias": True,
        "mlp_bias": True,
        "family": family.name,
    }
    config = DecoderConfig(**{**settings, **family.constants})
    sizes, found = axis_sizes(config), entries(config, file_format)
    assert len(found) == len(jax.tree.leaves(abstract_params(config)))
    pieces = [
        (name, entry.part and entry.part.index)
        for entry in found
        for names in entry.names
        for name in names
    ]
    assert len(pieces) == len(set(pieces))
    for entry in found:
        layer = entry.shape[1:] if entry.stacked else entry.shape
        axes = (math.prod(sizes[x] for x in axis) for axis in entry.layout.param)
        assert tuple(axes) == layer
