"""Tiny models on disk: recorded ones, and fresh ones written by transformers."""

import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parents[2] / "parity" / "golden"

TINY = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
"""A Llama with grouped queries, small enough for a test."""


@pytest.fixture(scope="session")
def random_params():
    """Returns a function that makes parameters of an architecture, nothing compiled."""
    from taid_jax.models.decoder import abstract_params

    def make(config, seed=0, dtype=np.float32):
        generator = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), dtype),
            abstract_params(config),
        )

    return make


@pytest.fixture(scope="session")
def golden_teacher():
    """A folder that transformers wrote, recorded with the project."""
    return GOLDEN / "run_taid" / "teacher"


@pytest.fixture
def tiny_settings():
    """The settings of the tiny Llama, as config.json has them."""
    return dict(TINY)


GGUF_SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}


TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
    list: gguf.GGUFValueType.ARRAY,
}


def interleaved(matrix, heads):
    """As llama.cpp's converter has a Llama's heads: halves of rotary pairs in turn."""
    split = matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, -1)
    return split.swapaxes(1, 2).reshape(matrix.shape)


def apart(matrix, heads):
    split = matrix.reshape(heads, matrix.shape[0] // heads // 2, 2, -1)
    return split.swapaxes(1, 2).reshape(matrix.shape)


def blocks_of(generator, array, kind):
    """The array in blocks, or random blocks of types that only decode."""
    try:
        return gguf.quantize(array, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (*array.shape[:-1], array.shape[-1] // block * size)
        return generator.integers(0, 256, shape, np.uint8)


def write_keys(writer, config):
    """The metadata that `convert_hf_to_gguf.py` writes for each family."""
    family, rope = config.family, config.rope
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if family == "llama":
        writer.add_vocab_size(config.vocab_size)
    if family in ("llama", "phi3"):
        writer.add_rope_dimension_count(rope.width(config.head_dim))
    if family != "gemma2":
        writer.add_rope_freq_base(rope.theta)
    if family in ("qwen3", "gemma2", "gemma3_text"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attention_softcap)
        writer.add_final_logit_softcapping(config.head_softcap)
    if family in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.window or 0)
    original = rope.original_max_position_embeddings
    if family == "phi3" and rope.kind != "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    elif family == "phi3":
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(rope.attention_factor)
        for name in ("long", "short"):
            factors = np.array(getattr(rope, f"{name}_factor"), np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    elif rope.kind != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(rope.factor)
        if rope.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(original)


@pytest.fixture(scope="session")
def write_gguf():
    """Returns a function that writes a random model as llama.cpp's converter does.

    It returns the model's config, and what the file holds, dequantised, under Hugging
    Face's names and in its order. Names of tensors come from the `gguf` package; what
    the converter does to the numbers is spelled out here. Keys are values, or pairs of
    a value and its type.
    """
    from taid_jax.models.families import read_config
    from taid_jax.models.files.entries import axis_sizes, entries

    def write(
        path,
        model_type="llama",
        *,
        kind="F32",
        keys=(),
        tokens=None,
        extra=None,
        **settings,
    ):
        values = {"model_type": model_type, **GGUF_SIZES}
        if model_type == "llama":
            values |= {"tie_word_embeddings": False, "rope_theta": 1e5}
        values |= settings
        config, kind = read_config(values, "gguf"), gguf.GGMLQuantizationType[kind]
        generator, sizes = np.random.default_rng(0), axis_sizes(config)
        architecture = ARCHITECTURES[model_type]
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
        write_keys(writer, config)
        for key, value in dict(keys).items():
            typed = value if isinstance(value, tuple) else (value, TYPES[type(value)])
            writer.add_key_value(key, *typed)
        if tokens is not None:
            tokens(writer)
        names = gguf.get_tensor_name_map(architecture, config.num_layers)
        shapes = {
            name: entry.tensor_shape(sizes)
            for entry in entries(config, "hf")
            for layer in entry.names
            for name in layer
        }
        state = {}
        for name, shape in shapes.items():
            # Numbers to which 1 can be added and taken off again without rounding.
            array = np.round(generator.normal(size=shape) * 64).astype(np.float32) / 64
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            turned = model_type == "llama" and ("q_proj" in name or "k_proj" in name)
            stored = interleaved(array, heads) if turned else array
            if model_type.startswith("gemma") and name.endswith("norm.weight"):
                stored = stored + 1
            if stored.ndim == 2:
                stored = blocks_of(generator, stored, kind)
                with np.errstate(all="ignore"):
                    array = gguf.dequantize(stored, kind)
                array = apart(array, heads) if turned else array
            own = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(own, stored, raw_dtype=kind if stored.ndim == 2 else None)
            state[name] = array
        for name, array in (extra or {}).items():
            writer.add_tensor(name, array)
        close(writer)
        return config, state

    return write


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def varied_strings():
    """Texts that tokenizers cut in different ways, and some with special tokens."""
    from taid_jax.probes import EDGES, TEXTS

    return [
        *(*TEXTS, *EDGES, "<|im_start|>the<|im_end|> the<tool>lo\n<|endoftext|>"),
        *(
            "<s>the</s> <unk>",
            "<s>",
            " </s>the",
            "<0x0A>",
            "\u2581 the\u2581lo",
            "\u0120",
        ),
    ]
