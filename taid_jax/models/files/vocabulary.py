"""Which entries of a vocabulary are real, and how many a model has."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig
from taid_jax.models.files.tokenizer import Tokenizer


def count_tokens(tokenizer: Tokenizer) -> int:
    """Returns one more than the largest id that a tokenizer gives.

    That is the number of its tokens, unless it leaves some ids out; these then count as
    entries like any other, for both models alike.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def with_tokenizer(config: DecoderConfig, tokenizer: Tokenizer) -> DecoderConfig:
    """Returns the settings with the padding of the vocabulary marked as such.

    Raises:
        ModelError: If the tokenizer has ids that the model has no embedding for.
    """
    count = count_tokens(tokenizer)
    if not 1 <= count <= config.padded_vocab_size:
        raise ModelError(
            f"the model has {config.padded_vocab_size:,} embeddings, and its tokenizer "
            f"ids up to {count - 1:,}: they do not belong together. Give the folder "
            "that has both, or --resize-embeddings, which makes the model's vocabulary "
            "that of the teacher's tokenizer"
        )
    return dataclasses.replace(config, vocab_size=count)


def resize_vocabulary(params: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns parameters with another number of vocabulary entries.

    Entries beyond the size are cut off; new ones are the mean of those there were, in
    the embedding and in the head. The settings that belong to them are
    `dataclasses.replace(config, vocab_size=size, padded_vocab_size=size)`.

    Args:
        params: Of a decoder.
        size: Entries to have.

    References:
        The published recipe resizes both models to the teacher's tokenizer.
    """
    resized = dict(params)
    embedding = params["embed"]["embedding"]
    resized["embed"] = {"embedding": _resize(embedding, size, axis=0)}
    if "lm_head" in params:
        # A kernel is (d, vocab), a bias (vocab,): the vocabulary is last in both.
        resized["lm_head"] = {
            name: _resize(leaf, size, axis=leaf.ndim - 1)
            for name, leaf in params["lm_head"].items()
        }
    return resized


def _resize(leaf: Array, size: int, *, axis: int) -> Array:
    there = leaf.shape[axis]
    if size <= there:
        return leaf[(slice(None),) * axis + (slice(0, size),)]
    mean = jnp.mean(leaf.astype(jnp.float32), axis=axis, keepdims=True)
    shape = (*leaf.shape[:axis], size - there, *leaf.shape[axis + 1 :])
    new = jnp.broadcast_to(mean.astype(leaf.dtype), shape)
    return jnp.concatenate([leaf, new], axis=axis)
