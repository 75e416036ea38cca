"""GGUF files of every family, read as the folders of the same weights."""

import json

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from taid_jax.errors import ModelError
from taid_jax.models.config import RopeConfig
from taid_jax.models.families import write_config
from taid_jax.models.files.load import load_config, load_model
from taid_jax.models.rope import rope_frequencies

TYPE = gguf.GGUFValueType
LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.0299999713897705, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.5, 2.0, 4.0, 9.0, 20.0, 31.0],
}
MODELS = {
    "llama": ("llama", {"kind": "F32", "rope_theta": 1e5, "num_key_value_heads": 1}),
    "llama-biases": (
        "llama",
        {"kind": "BF16", "attention_bias": True, "tie_word_embeddings": True},
    ),
    "llama-wide": (
        "llama",
        {"kind": "Q4_K", "hidden_size": 256, "intermediate_size": 256},
    ),
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


def load_by_folder(folder, config, state):
    """The same weights by way of a Hugging Face folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(config)))
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    save_file(arrays, folder / "model.safetensors")
    return load_model(folder)


@pytest.mark.parametrize("name", MODELS)
def test_load_model_reads_gguf_as_the_folder_of_the_same_weights(
    tmp_path, write_gguf, name
):
    family, settings = MODELS[name]
    config, state = write_gguf(
        tmp_path / "m.gguf", family, **{"kind": "Q8_0", **settings}
    )
    found = load_model(tmp_path / "m.gguf")
    expected = load_by_folder(tmp_path / "folder", config, state)
    assert found.config == expected.config == config
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_read_gguf_config_reads_the_rotary_factors_of_phi3(tmp_path, write_gguf):
    family, settings = MODELS["phi3-long"]
    write_gguf(tmp_path / "m.gguf", family, **settings)
    rope = load_config(tmp_path / "m.gguf").rope
    assert rope == RopeConfig(
        kind="longrope",
        partial_rotary_factor=0.75,
        original_max_position_embeddings=32,
        attention_factor=rope.attention_factor,
        short_factor=tuple(LONG_ROPE["short_factor"]),
        long_factor=tuple(LONG_ROPE["long_factor"]),
    )
    # Published: the root of 1 + log(4) / log(32), the extension and the original.
    assert rope.attention_factor == pytest.approx(1.1832159566)


@pytest.mark.parametrize(("layers", "expected"), [(46, 64 // 4), (3, 24)])
def test_read_gguf_config_knows_the_largest_gemma_by_its_layers(
    tmp_path, write_gguf, layers, expected
):
    sizes = {"head_dim": 24, "num_hidden_layers": layers}
    write_gguf(tmp_path / "m.gguf", "gemma2", **sizes)
    assert load_config(tmp_path / "m.gguf").query_pre_attn_scalar == expected


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        ((2, TYPE.UINT32), (16, None, 16)),
        (([True, True, False], TYPE.ARRAY), (16, 16, None)),
    ],
)
def test_read_gguf_config_reads_the_pattern_of_windows(
    tmp_path, write_gguf, pattern, windows
):
    family, settings = MODELS["gemma3"]
    keys = {"gemma3.attention.sliding_window_pattern": pattern}
    write_gguf(tmp_path / "m.gguf", family, keys=keys, **settings, num_hidden_layers=3)
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
def test_load_config_names_what_a_family_cannot_do(
    tmp_path, write_gguf, name, key, value
):
    of = {int: TYPE.UINT32, float: TYPE.FLOAT32}
    family, settings = MODELS[name]
    keys = {key: (value, of[type(value)])}
    write_gguf(tmp_path / "m.gguf", family, keys=keys, **settings)
    with pytest.raises(ModelError, match=key.split(".")[-1]):
        load_config(tmp_path / "m.gguf")


def test_load_model_agrees_with_transformers(tmp_path, write_gguf):
    pytest.importorskip("torch", reason="transformers reads GGUF with PyTorch only")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    write_gguf(tmp_path / "m.gguf", kind="Q4_1")
    loaded = load_model(tmp_path / "m.gguf")
    theirs = load_gguf_checkpoint(str(tmp_path / "m.gguf"))["config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**theirs))
    read = load_gguf_checkpoint(
        str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=model
    )
    state = {name: tensor.numpy() for name, tensor in read["tensors"].items()}
    expected = load_by_folder(tmp_path / "hf", loaded.config, state).params
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


def test_read_gguf_config_recognises_llama_3_by_its_rotary_factors(
    tmp_path, write_gguf
):
    # Published formula (Llama 3.1): wavelengths over 8192 are divided by the factor,
    # those under 8192 / 4 stay, between them it is interpolated.
    factors = []
    for pair in range(32):
        wavelength = 2 * np.pi * 1e5 ** (2 * pair / 64)
        share = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / 1.0:
            factors.append(32.0)
        else:
            factors.append(1 / ((1 - share) / 32.0 + share))
    assert any(1.0 < factor < 32.0 for factor in factors)
    extra = {"rope_freqs.weight": np.array(factors, np.float32)}
    write_gguf(tmp_path / "m.gguf", hidden_size=256, extra=extra)
    assert load_config(tmp_path / "m.gguf").rope == RopeConfig(
        theta=1e5,
        kind="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (np.linspace(1, 8, 8), "not those of Llama 3"),
        (np.full(8, np.nan), "not those of Llama 3"),
        (np.ones(3), r"shape \(3,\)"),
    ],
)
def test_read_gguf_config_refuses_other_rotary_factors(
    tmp_path, write_gguf, factors, words
):
    write_gguf(
        tmp_path / "m.gguf", extra={"rope_freqs.weight": factors.astype(np.float32)}
    )
    with pytest.raises(ModelError, match=words):
        load_config(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.expert_count", (8, TYPE.UINT32), "llama.expert_count"),
        ("llama.logit_scale", (0.5, TYPE.FLOAT32), "llama.logit_scale"),
        ("llama.attention.key_length", (32, TYPE.UINT32), "rope.dimension_count"),
        ("llama.rope.scaling.type", ("ntk", TYPE.STRING), "rope.scaling.type.*ntk"),
        ("llama.rope.scaling.type", ("longrope", TYPE.STRING), "rope_factors_long"),
        ("llama.rope.scaling.factor", (0.5, TYPE.FLOAT32), "factor >= 1"),
        ("split.count", (3, TYPE.UINT16), "one of several parts"),
    ],
)
def test_load_config_names_what_cannot_be_done(tmp_path, write_gguf, key, value, words):
    write_gguf(tmp_path / "m.gguf", keys={key: value})
    with pytest.raises(ModelError, match=words):
        load_config(tmp_path / "m.gguf")


def test_load_config_names_what_is_missing_or_not_supported(tmp_path):
    for architecture, words in (
        ("mamba", r"'mamba'.*supported are: llama"),
        ("llama", r"llama\.block_count: is missing.*rms_epsilon: is missing"),
    ):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(ModelError, match=words):
            load_config(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        # Where nothing is scaled by YaRN they are what the converter wrote as it found.
        ({"yarn_ext_factor": 0.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 7.0}, ""),
        ({"yarn_log_multiplier": 0.0, "finetuned": True}, ""),
        ({"yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"yarn_attn_factor": 0.5}, "yarn_attn_factor"),
        ({"type": "yarn", "factor": 2.0, "yarn_ext_factor": 0.0}, "yarn_ext_factor"),
        ({"type": "none", "factor": 2.0}, "contradicts"),
    ],
)
def test_read_gguf_config_knows_the_keys_of_yarn(tmp_path, write_gguf, keys, words):
    kinds = {str: TYPE.STRING, float: TYPE.FLOAT32, bool: TYPE.BOOL}
    typed = {
        f"llama.rope.scaling.{key}": (value, kinds[type(value)])
        for key, value in keys.items()
    }
    write_gguf(tmp_path / "m.gguf", keys=typed)
    if words:
        with pytest.raises(ModelError, match=words):
            load_config(tmp_path / "m.gguf")
    else:
        assert load_config(tmp_path / "m.gguf").rope == RopeConfig(theta=1e5)


def test_read_gguf_config_reads_the_bounds_of_yarn(tmp_path, write_gguf):
    keys = {
        "llama.rope.scaling.type": ("yarn", TYPE.STRING),
        "llama.rope.scaling.factor": (4.0, TYPE.FLOAT32),
        "llama.rope.scaling.original_context_length": (32, TYPE.UINT32),
        "llama.rope.scaling.yarn_ext_factor": (1.0, TYPE.FLOAT32),
        "llama.rope.scaling.yarn_beta_fast": (16.0, TYPE.FLOAT32),
        "llama.rope.scaling.yarn_beta_slow": (2.0, TYPE.FLOAT32),
    }
    write_gguf(tmp_path / "m.gguf", keys=keys)
    rope = load_config(tmp_path / "m.gguf").rope
    assert (rope.kind, rope.beta_fast, rope.beta_slow) == ("yarn", 16.0, 2.0)


def test_load_model_names_unknown_keys_of_a_gguf_file(tmp_path, write_gguf):
    keys = {"llama.strange": (3, TYPE.UINT32), "llama.inert": (0, TYPE.UINT32)}
    extra = {"blk.0.strange.weight": np.ones(3, np.float32)}
    write_gguf(tmp_path / "m.gguf", keys=keys, extra=extra)
    with pytest.raises(ModelError, match=r"llama\.strange: is not .*--allow-unknown"):
        load_config(tmp_path / "m.gguf")
    [note] = load_model(tmp_path / "m.gguf", allow_unknown_keys=True).notes
    assert note.endswith("left out: llama.strange, blk.0.strange.weight")


def test_load_model_refuses_two_scalings_of_a_gguf_file(tmp_path, write_gguf):
    keys = {
        "llama.rope.scaling.type": ("linear", TYPE.STRING),
        "llama.rope.scaling.factor": (2.0, TYPE.FLOAT32),
    }
    plain = RopeConfig(theta=1e5)
    llama3 = RopeConfig(theta=1e5, kind="llama3", factor=8.0)
    ones = np.ones(8, np.float32)
    factors = rope_frequencies(plain, 16) / rope_frequencies(llama3, 16)
    for name, values, words in (
        ("rope_freqs", factors, "the decoder does one"),
        ("rope_factors_long", ones, "rope_factors_long.weight"),
    ):
        write_gguf(tmp_path / name, keys=keys, extra={f"{name}.weight": values})
        (tmp_path / name).rename(tmp_path / f"{name}.gguf")
        with pytest.raises(ModelError, match=words):
            load_model(tmp_path / f"{name}.gguf")
    # Factors of one scale nothing, and what the metadata say is done.
    write_gguf(tmp_path / "m.gguf", keys=keys, extra={"rope_freqs.weight": ones})
    assert load_config(tmp_path / "m.gguf").rope.kind == "linear"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", 0),
        ("attention.key_length", 0),
        ("embedding_length", 0),
        ("rope.dimension_count", 0),
        ("context_length", 0),
        ("block_count", 2**31),
    ],
)
def test_load_config_refuses_sizes_of_nothing(tmp_path, write_gguf, key, value):
    write_gguf(tmp_path / "m.gguf")
    name = f"llama.{key}".encode()
    old = (tmp_path / "m.gguf").read_bytes()
    if name not in old:
        write_gguf(tmp_path / "m.gguf", keys={name.decode(): (value, TYPE.UINT32)})
    else:
        at = old.index(name) + len(name) + 4
        number = value.to_bytes(4, "little")
        (tmp_path / "m.gguf").write_bytes(old[:at] + number + old[at + 4 :])
    with pytest.raises(ModelError):
        load_config(tmp_path / "m.gguf")
