"""Architectures by name: shapes only, so that a plan needs no download."""

import dataclasses
from collections.abc import Mapping

from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.errors import ModelError

_SMOLLM2 = DecoderConfig(
    vocab_size=49152,
    d_model=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    max_length=8192,
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
    max_length=4096,
)

_LLAMA_3 = DecoderConfig(
    vocab_size=128256,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
    max_length=8192,
    rope=RopeConfig(theta=500_000.0),
)

_LLAMA_3_1 = dataclasses.replace(
    _LLAMA_3,
    max_length=131072,
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
    max_length=131072,
    rope=RopeConfig(theta=500_000.0, kind="llama3", factor=32.0),
    tie_embeddings=True,
)

# Qwen2 has a bias on queries, keys and values, none on the output of the attention.
_QWEN2 = DecoderConfig(
    vocab_size=152064,
    d_model=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=29568,
    max_length=32768,
    norm_eps=1e-6,
    rope=RopeConfig(theta=1_000_000.0),
    attention_bias=True,
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
        max_length=2048,
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
    "qwen2-72b": _QWEN2,
    "qwen2-1.5b": dataclasses.replace(
        _QWEN2,
        vocab_size=151936,
        d_model=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        mlp_dim=8960,
        tie_embeddings=True,
    ),
}

_NO_OUTPUT_BIAS = (
    "Qwen2 has no bias on the attention's output; the decoder gives it one, "
    "d_model numbers per layer (0.001% to 0.003% of the parameters) more than the model"
)

INEXACT: Mapping[str, str] = {
    "qwen2-72b": _NO_OUTPUT_BIAS,
    "qwen2-1.5b": _NO_OUTPUT_BIAS,
}
"""What differs between a preset and the model that it is named after."""


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
