"""GGUF files of every family, written as llama.cpp's converter does, read as folders.

Names of tensors come from the `gguf` package; what the converter does to the numbers
and which keys it writes is spelled out here.
"""

import dataclasses
import json

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from taid_jax.errors import ModelError
from taid_jax.models.config import RopeConfig
from taid_jax.models.families import read_config, write_config
from taid_jax.models.files.load import load_config, load_model
from taid_jax.models.files.weights import axis_sizes, entries

SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.0299999713897705, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.5, 2.0, 4.0, 9.0, 20.0, 31.0],
}
MODELS = {
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen2-yarn": (
        "qwen2",
        {
            "tie_word_embeddings": False,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 24, "rope_theta": 1e6, "rms_norm_eps": 1e-6}),
    "gemma2": (
        "gemma2",
        {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16},
    ),
    "gemma2-largest": (
        "gemma2",
        {"head_dim": 24, "query_pre_attn_scalar": 16, "num_hidden_layers": 46},
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16},
    ),
    "gemma3-linear": (
        "gemma3_text",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 7,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": ("phi3", {"sliding_window": 20, "tie_word_embeddings": False}),
    "phi3-long": (
        "phi3",
        {
            "tie_word_embeddings": False,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 32,
            "rope_scaling": LONG_ROPE,
        },
    ),
}
ARCH = gguf.MODEL_ARCH
ARCHITECTURES = {
    "qwen2": ARCH.QWEN2,
    "qwen3": ARCH.QWEN3,
    "gemma2": ARCH.GEMMA2,
    "gemma3_text": ARCH.GEMMA3,
    "phi3": ARCH.PHI3,
}


def config_of(name):
    family, changes = MODELS[name]
    return read_config({"model_type": family, **SIZES, **changes}, name)


def random_state(config, kind):
    """Tensors by Hugging Face's names; those of two axes as they come out of a GGUF."""
    generator, sizes = np.random.default_rng(0), axis_sizes(config)
    state = {}
    for entry in entries(config, "hf"):
        for name in (name for names in entry.names for name in names):
            shape = entry.tensor_shape(sizes)
            # Numbers to which 1 can be added and taken off again without rounding.
            array = np.round(generator.normal(size=shape) * 64).astype(np.float32) / 64
            if array.ndim == 2:
                array = gguf.dequantize(gguf.quantize(array, kind), kind)
            state[name] = array
    return state


def write_keys(writer, config, family):
    """The metadata that `convert_hf_to_gguf.py` writes for each family."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if family != "gemma2":
        writer.add_rope_freq_base(config.rope.theta)
    if family in ("qwen3", "gemma2", "gemma3_text"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attention_softcap)
        writer.add_final_logit_softcapping(config.head_softcap)
    if family in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.window or 0)
    if family == "phi3":
        writer.add_rope_dimension_count(config.rope.width(config.head_dim))
        long = config.rope.kind == "longrope"
        original = (
            config.rope.original_max_position_embeddings
            if long
            else config.max_position_embeddings
        )
        writer.add_rope_scaling_orig_ctx_len(original)
        if long:
            writer.add_rope_scaling_attn_factors(config.rope.attention_factor)
            for name in ("long", "short"):
                factors = getattr(config.rope, f"{name}_factor")
                writer.add_tensor(
                    f"rope_factors_{name}.weight", np.array(factors, np.float32)
                )
    elif config.rope.kind != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope.kind))
        writer.add_rope_scaling_factor(config.rope.factor)
        if config.rope.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(
                config.rope.original_max_position_embeddings
            )


def write_model(path, config, state, kind, extra=()):
    architecture = ARCHITECTURES[config.family]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    write_keys(writer, config, config.family)
    for key, value, of in extra:
        writer.add_key_value(key, value, of)
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    for name, array in state.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        if config.family.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if array.ndim == 2:
            writer.add_tensor(stored, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def export_model(folder, config, state):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(config)))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", [n for n in MODELS if n != "gemma2-largest"])
def test_load_model_reads_gguf_as_the_folder_of_the_same_weights(tmp_path, name):
    config = config_of(name)
    kind = gguf.GGMLQuantizationType.Q8_0
    state = random_state(config, kind)
    write_model(tmp_path / "m.gguf", config, state, kind)
    export_model(tmp_path / "folder", config, state)
    found, expected = load_model(tmp_path / "m.gguf"), load_model(tmp_path / "folder")
    assert found.config == expected.config == config
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_read_gguf_config_reads_the_rotary_factors_of_phi3(tmp_path):
    config = config_of("phi3-long")
    assert config.rope == RopeConfig(
        kind="longrope",
        partial_rotary_factor=0.75,
        original_max_position_embeddings=32,
        attention_factor=config.rope.attention_factor,
        short_factor=tuple(LONG_ROPE["short_factor"]),
        long_factor=tuple(LONG_ROPE["long_factor"]),
    )
    # Published: the root of 1 + log(4) / log(32), the extension and the original.
    assert config.rope.attention_factor == pytest.approx(1.1832159566)


def test_read_gguf_config_knows_the_largest_gemma_by_its_layers(tmp_path):
    config = config_of("gemma2-largest")
    kind = gguf.GGMLQuantizationType.F32
    write_model(tmp_path / "m.gguf", config, {}, kind)
    assert load_config(tmp_path / "m.gguf").query_pre_attn_scalar == 64 // 4
    fewer = dataclasses.replace(config, num_layers=3, window=None, window_layers=None)
    write_model(tmp_path / "n.gguf", fewer, {}, kind)
    assert load_config(tmp_path / "n.gguf").query_pre_attn_scalar == 24


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        ((2, gguf.GGUFValueType.UINT32), (16, None, 16)),
        (([True, True, False], gguf.GGUFValueType.ARRAY), (16, 16, None)),
    ],
)
def test_read_gguf_config_reads_the_pattern_of_windows(tmp_path, pattern, windows):
    config = config_of("gemma3")
    extra = [("gemma3.attention.sliding_window_pattern", *pattern)]
    kind = gguf.GGMLQuantizationType.F32
    write_model(tmp_path / "m.gguf", config, {}, kind, extra)
    assert load_config(tmp_path / "m.gguf").windows == windows


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen2", "qwen2.attention.sliding_window", 16),
        ("phi3", "phi3.final_logit_softcapping", 3.0),
        ("gemma2", "gemma2.rope.freq_base_swa", 5.0),
        ("qwen3", "qwen3.rope.dimension_count", 12),
        ("qwen3", "qwen3.attention.value_length", 12),
        ("gemma3", "gemma3.attention.sliding_window_pattern", 0),
    ],
)
def test_load_config_names_what_a_family_cannot_do(tmp_path, name, key, value):
    of = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    kind = gguf.GGMLQuantizationType.F32
    config = config_of(name)
    extra = [(key, value, of[type(value)])]
    write_model(tmp_path / "m.gguf", config, {}, kind, extra)
    with pytest.raises(ModelError, match=key.split(".")[-1]):
        load_config(tmp_path / "m.gguf")


def test_load_model_lists_fused_tensors_that_do_not_fit(tmp_path):
    config = config_of("phi3")
    kind = gguf.GGMLQuantizationType.F32
    state = random_state(config, kind)
    first, second = (f"model.layers.{i}.self_attn.qkv_proj.weight" for i in (0, 1))
    state[first] = state[first][:-1]
    del state[second]
    write_model(tmp_path / "m.gguf", config, state, kind)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path / "m.gguf")
    text = str(caught.value)
    assert "missing: blk.1.attn_qkv.weight, shape (128, 64)" in text
    assert "wrong shape: blk.0.attn_qkv.weight has (127, 64)" in text
    assert "(2 differences)" in text
