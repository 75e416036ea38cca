"""Tiny models on disk: recorded ones, and fresh ones written by transformers."""

import pathlib

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


@pytest.fixture(scope="session")
def write_llama():
    """Returns a function that writes a random Llama as transformers does."""
    reason = "PyTorch writes the reference model, and this environment has none"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers")

    def write(folder, *, dtype="float32", max_shard_size="5GB", seed=0, **changes):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**{**TINY, **changes})
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for tensor in model.parameters():
                # Norms start at one and biases at zero, which would hide mistakes.
                if tensor.ndim == 1:
                    tensor.add_(0.3 * torch.randn_like(tensor))
        model = model.to(getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return model

    return write


@pytest.fixture(scope="session")
def write_gguf():
    """Returns a function that writes a random Llama as llama.cpp's converter does.

    It returns what the file holds, dequantised, under Hugging Face's names and in its
    order; the order of llama.cpp is spelled out here and not taken from the package.
    """
    import gguf

    def permute(matrix, heads):
        # As llama.cpp's converter: the halves of each rotary pair side by side.
        split = matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, -1)
        return split.swapaxes(1, 2).reshape(matrix.shape)

    def unpermute(matrix, heads):
        split = matrix.reshape(heads, matrix.shape[0] // heads // 2, 2, -1)
        return split.swapaxes(1, 2).reshape(matrix.shape)

    def encode(generator, array, kind):
        """Returns the array in blocks, or random blocks of types that only decode."""
        try:
            return gguf.quantize(array, kind)
        except NotImplementedError:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            shape = (*array.shape[:-1], array.shape[-1] // block * size)
            return generator.integers(0, 256, shape, np.uint8)

    def write(
        path,
        *,
        vocab=40,
        width=64,
        layers=2,
        heads=4,
        groups=2,
        mlp=96,
        kind="F32",
        tied=False,
        bias=False,
        tokens=None,
        keys=(),
        extra=None,
    ):
        kind = gguf.GGMLQuantizationType[kind]
        generator = np.random.default_rng(0)
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(layers)
        writer.add_context_length(128)
        writer.add_embedding_length(width)
        writer.add_feed_forward_length(mlp)
        writer.add_head_count(heads)
        writer.add_head_count_kv(groups)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(width // heads)
        writer.add_rope_freq_base(1e5)
        writer.add_vocab_size(vocab)
        for name, value in dict(keys).items():
            writer.add_key_value(name, *value)
        if tokens is not None:
            tokens(writer)
        state = {}

        def add(hf, name, shape, permuted_heads=None):
            array = generator.normal(size=shape).astype(np.float32)
            if len(shape) == 1:
                stored = array[:, None]
                if permuted_heads:
                    stored = permute(stored, permuted_heads)
                writer.add_tensor(name, np.ascontiguousarray(stored[:, 0]))
            else:
                if permuted_heads:
                    array = permute(array, permuted_heads)
                blocks = encode(generator, array, kind)
                writer.add_tensor(name, blocks, raw_dtype=kind)
                with np.errstate(all="ignore"):
                    array = gguf.dequantize(blocks, kind)
                if permuted_heads:
                    array = unpermute(array, permuted_heads)
            state[hf] = array

        add("model.embed_tokens.weight", "token_embd.weight", (vocab, width))
        rows = groups * width // heads
        for i in range(layers):
            hf, ggml = f"model.layers.{i}.", f"blk.{i}."
            add(hf + "input_layernorm.weight", ggml + "attn_norm.weight", (width,))
            for name, key, shape, turned in (
                ("self_attn.q_proj", "attn_q", (width, width), heads),
                ("self_attn.k_proj", "attn_k", (rows, width), groups),
                ("self_attn.v_proj", "attn_v", (rows, width), None),
                ("self_attn.o_proj", "attn_output", (width, width), None),
            ):
                add(hf + name + ".weight", ggml + key + ".weight", shape, turned)
                if bias:
                    add(hf + name + ".bias", ggml + key + ".bias", shape[:1], turned)
            add(
                hf + "post_attention_layernorm.weight",
                ggml + "ffn_norm.weight",
                (width,),
            )
            for name, key, shape in (
                ("mlp.gate_proj", "ffn_gate", (mlp, width)),
                ("mlp.up_proj", "ffn_up", (mlp, width)),
                ("mlp.down_proj", "ffn_down", (width, mlp)),
            ):
                add(hf + name + ".weight", ggml + key + ".weight", shape)
        add("model.norm.weight", "output_norm.weight", (width,))
        if not tied:
            add("lm_head.weight", "output.weight", (vocab, width))
        for name, array in (extra or {}).items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return state

    return write


@pytest.fixture(scope="session")
def varied_strings():
    """Two hundred strings: languages, code, numbers, spaces, signs, special tokens."""
    generator = np.random.default_rng(0)
    pieces = [
        *("Hello world", "the cat sat", "don't", "I'LL", "Ünïcödé", "naïve café"),
        *("Привет", "مرحبا", "こんにちは", "漢字", "한국어", "नमस्ते", "\u0301"),
        *("🙂", "\U0001f469\u200d\U0001f467", "\U0001d518\U0001d52b", "ß", "²"),
        *("def f(x):\n\treturn x**2", '{"a": [1, 2.5e-3]}', "http://a.b/c?d=1"),
        *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>"),
        *("<0x0A>", "▁", "Ġ", "1234567890", "3.14159", "1,000,000", "٣٤"),
        *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u200b", "\u3000"),
        *("\x00", "\x7f", "...", "!?", "--", "$%^&*", "#", "'", '"', "`", "~", "\\n"),
        *("ABC", "aBc", "zzzzzzzzzzzz", "the<tool>lo"),
    ]
    strings = ["", *pieces]
    while len(strings) < 200:
        chosen = generator.choice(len(pieces), generator.integers(2, 9))
        joint = ["", " "][generator.integers(2)]
        strings.append(joint.join(pieces[index] for index in chosen))
    return strings
