"""Rotary positions: pairs of entries of a head rotate with the token's position."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from taid_jax.models.config import DecoderConfig, RopeConfig

Rotation = tuple[
    Float32[Array, "rows length pairs"], Float32[Array, "rows length pairs"]
]
"""Cosine and sine of every position and pair; one row when all sequences share it."""

Rotations = tuple[
    Float32[Array, "*kinds rows length pairs"],
    Float32[Array, "*kinds rows length pairs"],
]
"""The same, or those of several kinds of layers on a leading axis."""


def rope_frequencies(
    rope: RopeConfig, head_dim: int, *, long: bool = False
) -> Float32[np.ndarray, " pairs"]:
    """Returns the angle that each pair of a head rotates per position, in radians.

    Of "dynamic" they are those within the original context, and so are those of
    "longrope" unless `long`.

    References:
        Su et al., RoFormer (arXiv:2104.09864), section 3.2.2; Chen et al., position
        interpolation (arXiv:2306.15595) for "linear"; Peng et al., YaRN
        (arXiv:2309.00071), section 3.2; Ding et al., LongRoPE (arXiv:2402.13753); the
        Llama 3.1 model card and `modeling_rope_utils.py` of transformers for "llama3".
    """
    width = rope.width(head_dim)
    frequencies = rope.theta ** (-np.arange(0, width, 2) / width)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "longrope":
        factors = rope.long_factor if long else rope.short_factor
        frequencies = frequencies / np.array(factors)
    elif rope.kind in ("llama3", "yarn"):
        kept = _kept_in_llama3 if rope.kind == "llama3" else _kept_in_yarn
        share = kept(rope, frequencies)
        frequencies = frequencies * (share + (1 - share) / rope.factor)
    return frequencies.astype(np.float32)


def _kept_in_llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Returns 1 for a frequency that stays, 0 for one that is divided whole."""
    rotations = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    return np.clip((rotations - rope.low_freq_factor) / span, 0.0, 1.0)


def _kept_in_yarn(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Returns the same; between the bounds it falls evenly from pair to pair."""
    pairs = len(frequencies)

    def pair_that_rotates(times: float) -> float:
        ratio = rope.original_max_position_embeddings / (2 * math.pi * times)
        return pairs * math.log(ratio) / math.log(rope.theta)

    first, last = pair_that_rotates(rope.beta_fast), pair_that_rotates(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # As transformers bounds them: by the width, not by the number of pairs.
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    span = last - first if last != first else 0.001
    return 1 - np.clip((np.arange(pairs) - first) / span, 0.0, 1.0)


def rotation(
    positions: Int[Array, "rows length"], rope: RopeConfig, head_dim: int
) -> Rotation:
    """Returns the cosine and sine by which `rotate` rotates the heads.

    The kinds that depend on a sequence's length take the longest of the batch, as
    transformers does.
    """
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim))
    if rope.kind in ("dynamic", "longrope"):
        length = positions.max() + 1
        if rope.kind == "longrope":
            long = jnp.asarray(rope_frequencies(rope, head_dim, long=True))
            frequencies = jnp.where(
                length > rope.original_max_position_embeddings, long, frequencies
            )
        else:
            frequencies *= _dynamic_growth(rope, head_dim, length)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
    scale = rope.attention_factor
    if scale == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return scale * jnp.cos(angles), scale * jnp.sin(angles)


def _dynamic_growth(
    rope: RopeConfig, head_dim: int, length: Int[Array, ""]
) -> Float32[Array, " pairs"]:
    """Returns what the frequencies are multiplied by: 1 within the original context."""
    width = rope.width(head_dim)
    beyond = jnp.maximum(length, rope.original_max_position_embeddings).astype(
        jnp.float32
    )
    growth = rope.factor * (beyond / rope.original_max_position_embeddings - 1) + 1
    return growth ** jnp.asarray(-np.arange(0, width, 2) / (width - 2), jnp.float32)


def longest_short(config: DecoderConfig) -> int | None:
    """Returns the length beyond which positions that were rotated rotate otherwise.

    None when a position rotates the same in every sequence within the model's context.
    """
    ropes = [rope for rope in config.ropes if rope and rope.kind == "longrope"]
    return min((rope.original_max_position_embeddings for rope in ropes), default=None)


def layer_rotations(
    positions: Int[Array, "rows length"], config: DecoderConfig
) -> tuple[Rotations | None, Int[np.ndarray, " layers"] | None]:
    """Returns how the layers rotate their heads.

    That is the cosine and sine of all layers, and None; or, when layers differ, those
    of every kind of layer on a leading axis, and the index of each layer's kind. None
    twice when no layer rotates.
    """
    kinds = list(dict.fromkeys(config.ropes))
    if kinds == [None]:
        return None, None
    found = [rope and rotation(positions, rope, config.head_dim) for rope in kinds]
    cos, sin = next(each for each in found if each is not None)
    still = jnp.ones_like(cos), jnp.zeros_like(sin)
    found = [still if each is None else each for each in found]
    if len(kinds) == 1:
        return found[0], None
    index = np.array([kinds.index(rope) for rope in config.ropes], np.int32)
    return jax.tree.map(lambda *parts: jnp.stack(parts), *found), index


def rotate(
    heads: Float[Array, "batch *groups length head_dim"], rotation: Rotation
) -> Float[Array, "batch *groups length head_dim"]:
    """Returns the heads rotated by their positions, in float32 inside.

    Pairs are entry i and entry i + width / 2 of the width that is rotated, as in
    Hugging Face's weights; entries behind it stay as they are.
    """
    rows, length, pairs = rotation[0].shape
    shape = (rows,) + (1,) * (heads.ndim - 3) + (length, pairs)
    cos, sin = (
        jnp.broadcast_to(part.reshape(shape), (*heads.shape[:-1], pairs))
        for part in rotation
    )
    wide = heads[..., : 2 * pairs].astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.concatenate(rotated, axis=-1).astype(heads.dtype)
    if 2 * pairs == heads.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, heads[..., 2 * pairs :]], axis=-1)
