"""Rotary positions: pairs of entries of a head turn with the token's position."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from taid_jax.models.config import RopeConfig

Rotation = tuple[
    Float32[Array, "rows length pairs"], Float32[Array, "rows length pairs"]
]
"""Cosine and sine of every position and pair; one row when all sequences share it."""


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Float32[np.ndarray, " pairs"]:
    """Returns the angle that each pair of a head turns per position, in radians.

    References:
        Su et al., RoFormer (arXiv:2104.09864), section 3.2.2; Chen et al., position
        interpolation (arXiv:2306.15595) for "linear"; the Llama 3.1 model card and
        `_compute_llama3_parameters` of transformers for "llama3".
    """
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_length * frequencies / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        # 0: fewer turns in the original context than the low bound, divided whole;
        # 1: more than the high bound, kept.
        kept = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
        frequencies = frequencies * (kept + (1 - kept) / rope.factor)
    return frequencies.astype(np.float32)


def rotation(
    positions: Int[Array, "rows length"], rope: RopeConfig, head_dim: int
) -> Rotation:
    """Returns the cosine and sine by which `rotate` turns the heads."""
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim))
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    heads: Float[Array, "batch *groups length head_dim"], turn: Rotation
) -> Float[Array, "batch *groups length head_dim"]:
    """Returns the heads turned by their positions, in float32 inside.

    Pairs are entry i and entry i + head_dim / 2, as in Hugging Face's weights.
    """
    rows, length, pairs = turn[0].shape
    shape = (rows,) + (1,) * (heads.ndim - 3) + (length, pairs)
    cos, sin = (
        jnp.broadcast_to(part.reshape(shape), (*heads.shape[:-1], pairs))
        for part in turn
    )
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return turned.astype(heads.dtype)
