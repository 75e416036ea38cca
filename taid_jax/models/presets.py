"""Architectures by name: shapes only, so that a plan needs no download.

What is not said is as the family's own default has it.
"""

import dataclasses
from collections.abc import Mapping

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.families import read_config

_SMOLLM2 = DecoderConfig(
    vocab_size=49152,
    d_model=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    max_position_embeddings=8192,
    rope=RopeConfig(theta=100_000.0),
    tie_embeddings=True,
)

_LLAMA_2 = DecoderConfig(
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    mlp_dim=11008,
    max_position_embeddings=4096,
)

_LLAMA_3 = DecoderConfig(
    vocab_size=128256,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
    max_position_embeddings=8192,
    rope=RopeConfig(theta=500_000.0),
)

_LLAMA_3_1 = dataclasses.replace(
    _LLAMA_3,
    max_position_embeddings=131072,
    rope=RopeConfig(theta=500_000.0, kind="llama3", factor=8.0),
)

_LLAMA_3_2 = DecoderConfig(
    vocab_size=128256,
    d_model=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=8192,
    max_position_embeddings=131072,
    rope=RopeConfig(theta=500_000.0, kind="llama3", factor=32.0),
    tie_embeddings=True,
)


def _config(family: str, **keys: object) -> DecoderConfig:
    """Returns the architecture of a config.json with these keys."""
    return read_config({"model_type": family, **keys}, f"the preset of a {family}")


def _sizes(
    vocab: int, width: int, layers: int, heads: int, kv_heads: int, mlp: int
) -> dict[str, object]:
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
    }


def _qwen2(*sizes: int, tied: bool = False) -> DecoderConfig:
    return _config("qwen2", **_sizes(*sizes), rope_theta=1e6, tie_word_embeddings=tied)


def _qwen3(*sizes: int, tied: bool = False) -> DecoderConfig:
    return _config(
        "qwen3",
        **_sizes(*sizes),
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=tied,
    )


def _pythia(width: int, layers: int, heads: int) -> DecoderConfig:
    return _config(
        "gpt_neox",
        vocab_size=50304,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )


# From the config.json of each model's release on the Hugging Face Hub.
PRESETS: Mapping[str, DecoderConfig] = {
    "smollm2-135m": _SMOLLM2,
    "smollm2-360m": dataclasses.replace(
        _SMOLLM2,
        d_model=960,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        mlp_dim=2560,
    ),
    "smollm2-1.7b": dataclasses.replace(
        _SMOLLM2,
        d_model=2048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        mlp_dim=8192,
        rope=RopeConfig(theta=130_000.0),
    ),
    "tinyllama-1.1b": DecoderConfig(
        vocab_size=32000,
        d_model=2048,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        mlp_dim=5632,
        max_position_embeddings=2048,
    ),
    "llama-2-7b": _LLAMA_2,
    "llama-2-13b": dataclasses.replace(
        _LLAMA_2,
        d_model=5120,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        mlp_dim=13824,
    ),
    "llama-2-70b": dataclasses.replace(
        _LLAMA_2,
        d_model=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        mlp_dim=28672,
    ),
    "llama-3-8b": _LLAMA_3,
    "llama-3-70b": dataclasses.replace(
        _LLAMA_3, d_model=8192, num_layers=80, num_heads=64, mlp_dim=28672
    ),
    "llama-3.1-8b": _LLAMA_3_1,
    "llama-3.2-1b": _LLAMA_3_2,
    "llama-3.2-3b": dataclasses.replace(
        _LLAMA_3_2, d_model=3072, num_layers=28, num_heads=24, head_dim=128
    ),
    "qwen2-0.5b": _qwen2(151936, 896, 24, 14, 2, 4864, tied=True),
    "qwen2-1.5b": _qwen2(151936, 1536, 28, 12, 2, 8960, tied=True),
    "qwen2-7b": _qwen2(152064, 3584, 28, 28, 4, 18944),
    "qwen2-72b": _qwen2(152064, 8192, 80, 64, 8, 29568),
    "qwen3-0.6b": _qwen3(151936, 1024, 28, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _qwen3(151936, 2048, 28, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen3(151936, 2560, 36, 32, 8, 9728, tied=True),
    "qwen3-8b": _qwen3(151936, 4096, 36, 32, 8, 12288),
    "qwen3-32b": _qwen3(151936, 5120, 64, 64, 8, 25600),
    "mistral-7b": _config(
        "mistral",
        **_sizes(32000, 4096, 32, 32, 8, 14336),
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=4096,
    ),
    "gemma-2-2b": _config("gemma2", **_sizes(256000, 2304, 26, 8, 4, 9216)),
    "gemma-2-9b": _config("gemma2", **_sizes(256000, 3584, 42, 16, 8, 14336)),
    "gemma-2-27b": _config(
        "gemma2",
        **_sizes(256000, 4608, 46, 32, 16, 36864),
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
    "gemma-3-1b": _config(
        "gemma3_text",
        **_sizes(262144, 1152, 26, 4, 1, 6912),
        max_position_embeddings=32768,
        sliding_window=512,
    ),
    "phi-3-mini": _config(
        "phi3", **_sizes(32064, 3072, 32, 32, 32, 8192), sliding_window=2047
    ),
    "phi-4": _config(
        "phi3",
        **_sizes(100352, 5120, 40, 40, 10, 17920),
        max_position_embeddings=16384,
        rope_theta=250_000.0,
    ),
    "stablelm-zephyr-3b": _config("stablelm", **_sizes(50304, 2560, 32, 32, 32, 6912)),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "olmo-2-1b": _config(
        "olmo2",
        **_sizes(100352, 2048, 16, 16, 16, 8192),
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_theta=500_000.0,
    ),
    "smollm3-3b": _config(
        "smollm3",
        **_sizes(128256, 2048, 36, 16, 4, 11008),
        max_position_embeddings=65536,
        rope_theta=5e6,
    ),
    "gpt2": _config("gpt2"),
}


def preset(name: str) -> DecoderConfig:
    """Returns the architecture of that name.

    Raises:
        ModelError: If there is none; the message lists the known names.
    """
    if name not in PRESETS:
        raise ModelError(
            f"no preset is called {name!r}; known are {', '.join(PRESETS)}"
        )
    return PRESETS[name]
