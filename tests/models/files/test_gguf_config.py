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


@pytest.fixture
def config_of(tmp_path, write_gguf):
    """Returns a function that writes a file of a model and reads its settings."""

    def write(name="plain", **changes):
        family, settings = MODELS.get(name, ("llama", {}))
        write_gguf(tmp_path / "m.gguf", family, **{**settings, **changes})
        return load_config(tmp_path / "m.gguf")

    return write


@pytest.mark.parametrize(("layers", "expected"), [(46, 64 // 4), (3, 24)])
def test_read_gguf_config_knows_the_largest_gemma_by_its_layers(
    config_of, layers, expected
):
    found = config_of("gemma2", num_hidden_layers=layers)
    assert found.query_pre_attn_scalar == expected


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [(2, (16, None, 16)), ([True, True, False], (16, 16, None))],
)
def test_read_gguf_config_reads_the_pattern_of_windows(config_of, pattern, windows):
    keys = {"gemma3.attention.sliding_window_pattern": pattern}
    assert config_of("gemma3", keys=keys, num_hidden_layers=3).windows == windows


YARN = {"type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("qwen2", {"qwen2.attention.sliding_window": 16}, "sliding_window"),
        ("phi3", {"phi3.final_logit_softcapping": 3.0}, "final_logit_softcapping"),
        ("gemma2", {"gemma2.rope.freq_base_swa": 5.0}, "freq_base_swa"),
        ("qwen3", {"qwen3.rope.dimension_count": 12}, "dimension_count"),
        ("qwen3", {"qwen3.attention.value_length": 12}, "value_length"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": 0}, "window_pattern"),
        ("plain", {"llama.expert_count": 8}, "llama.expert_count"),
        ("plain", {"llama.logit_scale": 0.5}, "llama.logit_scale"),
        ("plain", {"llama.attention.key_length": 32}, "rope.dimension_count"),
        ("plain", {"type": "ntk"}, "rope.scaling.type.*ntk"),
        ("plain", {"type": "longrope"}, "rope_factors_long"),
        ("plain", {"factor": 0.5}, "factor >= 1"),
        ("plain", {"type": "none", "factor": 2.0}, "contradicts"),
        ("plain", {"yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ("plain", {"yarn_attn_factor": 0.5}, "yarn_attn_factor"),
        ("plain", {**YARN, "yarn_ext_factor": 0.0}, "yarn_ext_factor"),
        ("plain", {"split.count": 3}, "one of several parts"),
    ],
)
def test_load_config_names_what_cannot_be_done(config_of, name, keys, words):
    with pytest.raises(ModelError, match=words):
        config_of(name, keys=scaling(keys))


def scaling(keys):
    """The same with names in full; without a dot they are of a Llama's scaling."""
    start = "llama.rope.scaling."
    return {key if "." in key else start + key: each for key, each in keys.items()}


@pytest.mark.parametrize(
    "keys",
    [
        # Where nothing is scaled by YaRN they are what the converter wrote as it found.
        {"yarn_ext_factor": 0.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 7.0},
        {"yarn_log_multiplier": 0.0, "finetuned": True},
    ],
)
def test_read_gguf_config_passes_keys_that_scale_nothing(config_of, keys):
    assert config_of(keys=scaling(keys)).rope == RopeConfig(theta=1e5)


def test_read_gguf_config_reads_the_bounds_of_yarn(config_of):
    bounds = {"yarn_ext_factor": 1.0, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}
    rope = config_of(
        keys=scaling({**YARN, "original_context_length": 32, **bounds})
    ).rope
    assert (rope.kind, rope.beta_fast, rope.beta_slow) == ("yarn", 16.0, 2.0)


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


def test_read_gguf_config_recognises_llama_3_by_its_rotary_factors(config_of):
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
    assert config_of(hidden_size=256, extra=extra).rope == RopeConfig(
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
def test_read_gguf_config_refuses_other_rotary_factors(config_of, factors, words):
    with pytest.raises(ModelError, match=words):
        config_of(extra={"rope_freqs.weight": factors.astype(np.float32)})


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


def test_load_model_names_unknown_keys_of_a_gguf_file(tmp_path, write_gguf):
    keys = {"llama.strange": 3, "llama.inert": 0}
    extra = {"blk.0.strange.weight": np.ones(3, np.float32)}
    write_gguf(tmp_path / "m.gguf", keys=keys, extra=extra)
    with pytest.raises(ModelError, match=r"llama\.strange: is not .*--allow-unknown"):
        load_config(tmp_path / "m.gguf")
    [note] = load_model(tmp_path / "m.gguf", allow_unknown_keys=True).notes
    assert note.endswith("left out: llama.strange, blk.0.strange.weight")


def test_load_config_refuses_two_scalings_of_a_gguf_file(config_of):
    keys = scaling({"type": "linear", "factor": 2.0})
    plain = RopeConfig(theta=1e5)
    llama3 = RopeConfig(theta=1e5, kind="llama3", factor=8.0)
    ones = np.ones(8, np.float32)
    factors = rope_frequencies(plain, 16) / rope_frequencies(llama3, 16)
    for name, values, words in (
        ("rope_freqs", factors, "the decoder does one"),
        ("rope_factors_long", ones, "rope_factors_long.weight"),
    ):
        with pytest.raises(ModelError, match=words):
            config_of(keys=keys, extra={f"{name}.weight": values})
    # Factors of one scale nothing, and what the metadata say is done.
    found = config_of(keys=keys, extra={"rope_freqs.weight": ones})
    assert found.rope.kind == "linear"


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
        write_gguf(tmp_path / "m.gguf", keys={name.decode(): value})
    else:
        at = old.index(name) + len(name) + 4
        number = value.to_bytes(4, "little")
        (tmp_path / "m.gguf").write_bytes(old[:at] + number + old[at + 4 :])
    with pytest.raises(ModelError):
        load_config(tmp_path / "m.gguf")
