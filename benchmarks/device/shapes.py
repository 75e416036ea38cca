"""Architectures of the models that `check_device.py` makes, and where they lie."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from taid_jax.models.config import DecoderConfig
from taid_jax.models.presets import preset
from taid_jax.sharding import make_mesh


def only(device: Any) -> Mesh:
    """Returns the mesh of one device, though there may be more.

    The trainer has a mesh too: without one, no kernel is taken beside other devices.
    """
    return make_mesh("data=1", [device])


def tiny_config(width: int = 64, *, layers: int = 2, vocab: int = 512) -> DecoderConfig:
    """Returns a Llama 3.2 with small sizes, two query heads for each key head."""
    return dataclasses.replace(
        preset("llama-3.2-1b"),
        vocab_size=vocab,
        padded_vocab_size=vocab,
        d_model=width,
        num_layers=layers,
        num_heads=width // 16,
        num_kv_heads=width // 32,
        head_dim=16 if width < 512 else 64,
        mlp_dim=2 * width,
        max_position_embeddings=2048,
    )


def student_config(small: bool) -> DecoderConfig:
    """Returns the 1B student."""
    return tiny_config() if small else preset("llama-3.2-1b")


def teacher_config(small: bool) -> DecoderConfig:
    """Returns the 3B teacher."""
    return tiny_config(96) if small else preset("llama-3.2-3b")
