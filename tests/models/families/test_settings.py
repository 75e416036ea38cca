"""config.json of every family: what transformers takes, writes and refuses."""

import dataclasses
import json

import pytest

from taid_jax.errors import ModelError
from taid_jax.models.config import RopeConfig
from taid_jax.models.families import FAMILIES, read_config, write_config
from taid_jax.models.families.fields import Required

REASON = "transformers says what is expected, and this environment has none"


def as_json(config):
    return json.loads(json.dumps(config.to_dict(), default=str))


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture
def standard(family):
    """The settings of transformers for a family, nothing chosen."""
    transformers = pytest.importorskip("transformers", reason=REASON)
    return as_json(transformers.AutoConfig.for_model(family.name))


def test_read_config_takes_the_defaults_of_transformers(family, standard):
    needed = {
        setting.key
        for setting in family.settings
        if isinstance(setting.default, Required)
    }
    few = {key: standard[key] for key in needed} | {"model_type": family.name}
    assert read_config(few, "few") == read_config(standard, "all")


def test_write_config_is_read_alike_by_transformers(family, standard, tmp_path):
    transformers = pytest.importorskip("transformers", reason=REASON)
    config = read_config(standard, "config.json")
    shallow = [
        dataclasses.replace(
            config,
            num_layers=2,
            window_layers=config.window_layers and pattern,
            rope_layers=config.rope_layers and pattern,
        )
        for pattern in ((False, True), (False, False))
    ]
    for each in (config, *shallow):
        values = write_config(each)
        (tmp_path / "config.json").write_text(json.dumps(values))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        again = read_config(as_json(theirs), "of transformers")
        assert (again.windows, again.ropes) == (each.windows, each.ropes)
        assert write_config(again) == values


LONG = {"short_factor": [1.0] * 47, "long_factor": [2.0] * 47}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mistral", {"layer_types": ["full_attention"]}, "layer_types: is not a"),
        ("mistral", {"sliding_window": 0}, "window > 0, got 0"),
        ("mistral", {"hidden_act": "tanh"}, "hidden_act: the decoder can do silu"),
        ("qwen2", {"layer_types": ["linear_attention"]}, "layer_types: need full"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window: need true"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types: need a list"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv: is not a setting"),
        ("olmo2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: need one for each"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("stablelm", {"partial_rotary_factor": 0.01}, "rotary pairs"),
        ("stablelm", {"qk_layernorm": 1}, "qk_layernorm: need true or false"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attention_softcap > 0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": {"chunked": {}}}, "chunked: is not a"),
        ("gemma3_text", {"rope_local_base_freq": 0.0}, "theta > 0"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("phi3", {"rope_scaling": {"type": "longrope", **LONG}}, r"\d+ rope short"),
        ("gpt_neox", {"rotary_pct": 1.5}, "partial_rotary_factor <= 1"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "short_factor: is missing"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "factor: is missing"),
    ],
)
def test_read_config_names_what_cannot_be_done(name, changes, words):
    transformers = pytest.importorskip("transformers", reason=REASON)
    values = as_json(transformers.AutoConfig.for_model(name))
    if "rope_parameters" in values:
        # What stands beside it counts only without it.
        del values["rope_parameters"]
    with pytest.raises(ModelError, match=words):
        read_config({**values, **changes}, "config.json")


def test_write_config_refuses_what_the_family_cannot_say(standard):
    config = read_config(standard, "config.json")
    with pytest.raises(ModelError, match=r"cannot describe this model: .*norm"):
        write_config(dataclasses.replace(config, norm="layer_no_bias"))


GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 128256,
}


def test_read_config_reads_files_as_they_are_published():
    gemma = read_config(GEMMA3_1B, "gemma")
    assert (gemma.rope, gemma.local_rope) == (RopeConfig(1e6), RopeConfig(1e4))
    assert [i for i, window in enumerate(gemma.windows) if window is None] == [
        *(5, 11, 17, 23),
    ]
    assert (gemma.window, gemma.tie_embeddings, gemma.num_kv_heads) == (512, True, 1)
    smollm = read_config(SMOLLM3_3B, "smollm")
    assert smollm.ropes == (*[RopeConfig(5e6)] * 3, None) * 9
    assert (smollm.window, smollm.tie_embeddings, smollm.head_dim) == (None, True, 128)


def test_rope_of_transformers_4_is_read_as_that_of_5():
    values = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 67,
        "max_position_embeddings": 64,
    }
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16}
    old = {"rope_theta": 1e3, "rope_scaling": {"type": "yarn", **yarn}}
    new = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e3, **yarn}}
    qwen = {**values, "model_type": "qwen2"}
    expected = RopeConfig(
        theta=1e3,
        kind="yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        # 0.1 ln(4) + 1
        attention_factor=1.138629436111989,
    )
    assert read_config({**qwen, **old}, "old").rope == expected
    assert read_config({**qwen, **new}, "new").rope == expected
    gemma = {**values, "model_type": "gemma3_text", "num_hidden_layers": 6}
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    read = read_config({**gemma, "rope_local_base_freq": 5e3, **scaled}, "old")
    assert read.rope == RopeConfig(1e6, "linear", 8.0)
    assert read.local_rope == RopeConfig(5e3)
    assert read.window_layers == (True,) * 5 + (False,)
    phi = {**values, "model_type": "phi3", "original_max_position_embeddings": 16}
    su = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    read = read_config({**phi, "rope_scaling": su}, "old").rope
    assert read is not None
    assert (read.kind, read.original_max_position_embeddings) == ("longrope", 16)
    # The root of 1 + ln(64 / 16) / ln(16).
    assert read.attention_factor == pytest.approx(1.5**0.5)
