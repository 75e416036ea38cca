"""Architectures by name: shapes only, so that a plan needs no download.

What is not said is as the family's own default has it.
"""

from collections.abc import Mapping

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig
from taid_jax.models.families import read_config

_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size"),
)


def _config(family: str, *sizes: int, **keys: object) -> DecoderConfig:
    """Returns the architecture of a config.json with these keys."""
    named = dict(zip(_SIZES, sizes, strict=False))
    values = {"model_type": family, **named, **keys}
    return read_config(values, f"the preset of a {family}")


def _smollm2(*sizes: int, theta: float = 1e5) -> DecoderConfig:
    return _config(
        "llama",
        *(49152, *sizes),
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        tie_word_embeddings=True,
    )


def _llama(*sizes: int, length: int, **keys: object) -> DecoderConfig:
    return _config(
        "llama", *sizes, max_position_embeddings=length, rms_norm_eps=1e-5, **keys
    )


def _llama3(*sizes: int, factor: float | None = None, **keys: object) -> DecoderConfig:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return _llama(
        *(128256, *sizes),
        length=131072 if factor else 8192,
        rope_theta=5e5,
        rope_scaling=scaling if factor else None,
        **keys,
    )


def _qwen2(*sizes: int, tied: bool = False) -> DecoderConfig:
    return _config("qwen2", *sizes, rope_theta=1e6, tie_word_embeddings=tied)


def _qwen3(*sizes: int, tied: bool = False) -> DecoderConfig:
    return _config(
        "qwen3",
        *(151936, *sizes),
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=tied,
    )


def _pythia(width: int, layers: int, heads: int) -> DecoderConfig:
    return _config("gpt_neox", 50304, width, layers, heads, intermediate_size=4 * width)


# From the config.json of each model's release on the Hugging Face Hub.
PRESETS: Mapping[str, DecoderConfig] = {
    "smollm2-135m": _smollm2(576, 30, 9, 3, 1536),
    "smollm2-360m": _smollm2(960, 32, 15, 5, 2560),
    "smollm2-1.7b": _smollm2(2048, 24, 32, 32, 8192, theta=1.3e5),
    "tinyllama-1.1b": _llama(32000, 2048, 22, 32, 4, 5632, length=2048),
    "llama-2-7b": _llama(32000, 4096, 32, 32, 32, 11008, length=4096),
    "llama-2-13b": _llama(32000, 5120, 40, 40, 40, 13824, length=4096),
    "llama-2-70b": _llama(32000, 8192, 80, 64, 8, 28672, length=4096),
    "llama-3-8b": _llama3(4096, 32, 32, 8, 14336),
    "llama-3-70b": _llama3(8192, 80, 64, 8, 28672),
    "llama-3.1-8b": _llama3(4096, 32, 32, 8, 14336, factor=8.0),
    "llama-3.2-1b": _llama3(
        2048, 16, 32, 8, 8192, factor=32.0, tie_word_embeddings=True
    ),
    "llama-3.2-3b": _llama3(
        3072, 28, 24, 8, 8192, factor=32.0, tie_word_embeddings=True
    ),
    "qwen2-0.5b": _qwen2(151936, 896, 24, 14, 2, 4864, tied=True),
    "qwen2-1.5b": _qwen2(151936, 1536, 28, 12, 2, 8960, tied=True),
    "qwen2-7b": _qwen2(152064, 3584, 28, 28, 4, 18944),
    "qwen2-72b": _qwen2(152064, 8192, 80, 64, 8, 29568),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288),
    "qwen3-32b": _qwen3(5120, 64, 64, 8, 25600),
    "mistral-7b": _config(
        *("mistral", 32000, 4096, 32, 32, 8, 14336),
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=4096,
    ),
    "gemma-2-2b": _config("gemma2", 256000, 2304, 26, 8, 4, 9216),
    "gemma-2-9b": _config("gemma2", 256000, 3584, 42, 16, 8, 14336),
    "gemma-2-27b": _config(
        *("gemma2", 256000, 4608, 46, 32, 16, 36864),
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
    "gemma-3-1b": _config(
        *("gemma3_text", 262144, 1152, 26, 4, 1, 6912),
        max_position_embeddings=32768,
        sliding_window=512,
    ),
    "phi-3-mini": _config("phi3", 32064, 3072, 32, 32, 32, 8192, sliding_window=2047),
    "phi-4": _config(
        *("phi3", 100352, 5120, 40, 40, 10, 17920),
        max_position_embeddings=16384,
        rope_theta=250_000.0,
    ),
    "stablelm-zephyr-3b": _config("stablelm", 50304, 2560, 32, 32, 32, 6912),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "olmo-2-1b": _config(
        *("olmo2", 100352, 2048, 16, 16, 16, 8192),
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_theta=500_000.0,
    ),
    "smollm3-3b": _config(
        *("smollm3", 128256, 2048, 36, 16, 4, 11008),
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
