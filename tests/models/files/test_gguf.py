"""GGUF files in: every quantisation, llama.cpp's order, and broken files."""

import json

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.families import write_config
from taid_jax.models.files.gguf import open_gguf
from taid_jax.models.files.load import load_config, load_model
from taid_jax.models.rope import rope_frequencies

TYPE = gguf.GGUFValueType
KINDS = [
    gguf.GGMLQuantizationType[name]
    for name in (
        *("Q4_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M"),
        *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0", "MXFP4"),
    )
]


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference(folder, config, state):
    """Loads the same weights by way of a Hugging Face folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(config)))
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return load_model(folder).params


def refusal(path):
    with pytest.raises(ModelError) as caught:
        load_model(path)
    return str(caught.value)


def test_load_config_reads_the_metadata(tmp_path, write_gguf):
    write_gguf(tmp_path / "m.gguf")
    assert load_config(tmp_path / "m.gguf") == DecoderConfig(
        vocab_size=40,
        d_model=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=96,
        max_position_embeddings=128,
        # The file has float32's 9.99999974e-06; what was meant is read.
        norm_eps=1e-5,
        rope=RopeConfig(theta=1e5),
    )


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_1", "Q4_K"])
def test_load_model_dequantises(tmp_path, write_gguf, kind):
    state = write_gguf(tmp_path / "m.gguf", kind=kind, width=256, mlp=256, layers=1)
    loaded = load_model(tmp_path / "m.gguf")
    expected = reference(tmp_path / "hf", loaded.config, state)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


def test_read_dequantises_every_type_that_the_gguf_package_undoes(tmp_path):
    # Random blocks; their scales may be infinite or no number, which stays so.
    generator, blocks = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for kind in KINDS:
        size = 256 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
        blocks[kind] = generator.integers(0, 256, (3, size), np.uint8)
        writer.add_tensor(kind.name, blocks[kind], raw_dtype=kind)
    close(writer)
    file = open_gguf(tmp_path / "m.gguf")
    for kind, raw in blocks.items():
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(raw, kind)
        found = file.read(kind.name, (slice(1, 3), slice(5, 250)))
        np.testing.assert_array_equal(found, expected[1:, 5:250])


@pytest.mark.parametrize(("tied", "groups"), [(False, 1), (True, 4)])
def test_load_model_puts_queries_and_keys_back(tmp_path, write_gguf, tied, groups):
    state = write_gguf(tmp_path / "m.gguf", tied=tied, bias=tied, groups=groups)
    loaded = load_model(tmp_path / "m.gguf")
    assert loaded.config.tie_embeddings == loaded.config.attention_bias == tied
    expected = reference(tmp_path / "hf", loaded.config, state)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


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
    expected = reference(tmp_path / "hf", loaded.config, state)
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
    write_gguf(tmp_path / "m.gguf", width=256, layers=1, extra=extra)
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
        close(gguf.GGUFWriter(tmp_path / "m.gguf", architecture))
        with pytest.raises(ModelError, match=words):
            load_config(tmp_path / "m.gguf")


def test_load_model_lists_tensors_that_do_not_fit(tmp_path, write_gguf):
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    write_gguf(tmp_path / "m.gguf", extra=extra)
    assert "unexpected: blk.0.attn_q_norm.weight" in refusal(tmp_path / "m.gguf")


def test_load_model_names_types_that_cannot_be_dequantised(tmp_path, write_gguf):
    extra = {"strange.weight": np.ones(16, np.int32)}
    write_gguf(tmp_path / "m.gguf", extra=extra)
    assert "strange.weight (I32)" in refusal(tmp_path / "m.gguf")


def test_read_returns_a_part_of_a_vector(tmp_path, write_gguf):
    state = write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    norm = open_gguf(tmp_path / "m.gguf").read("output_norm.weight", (slice(3, 9),))
    np.testing.assert_array_equal(norm, state["model.norm.weight"][3:9])


def test_read_says_when_the_file_was_cut_off_meanwhile(tmp_path, write_gguf):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    file = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="cut off while it was read"):
        file.read("output.weight", (slice(0, 40), slice(0, 64)))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" + bytes(100)])
def test_load_model_refuses_what_is_no_gguf_file(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert str(path) in refusal(path)


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
