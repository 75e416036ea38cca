"""Floating-point operations of a decoder's forward pass, from its architecture."""

from typing import NamedTuple

from taid_jax.models.config import DecoderConfig


class ForwardFlops(NamedTuple):
    """Operations of one forward pass by where they are done, over all devices.

    Attributes:
        projections: Products of all layers with their weights.
        attention: Scores, and the values that they weigh.
        head: Logits.
    """

    projections: int
    attention: int
    head: int


def forward_flops(config: DecoderConfig, batch: int, length: int) -> ForwardFlops:
    """Returns the floating-point operations of one forward pass, by part.

    A product of n and m numbers counts 2 n m. Attention counts the half of the square
    that a causal mask leaves, and of it what a layer's window leaves; norms, softmax
    and activations do not count. There are `batch` sequences of `length` tokens.
    """
    tokens = batch * length
    heads = config.num_heads + config.num_kv_heads
    attention_weights = 2 * config.d_model * config.head_dim * heads
    mlp_weights = (3 if config.gated_mlp else 2) * config.d_model * config.mlp_dim
    weights = config.num_layers * (attention_weights + mlp_weights)
    pairs = sum(_visible_pairs(length, window) for window in config.windows)
    attended = 2 * config.num_heads * config.head_dim * batch * pairs
    return ForwardFlops(
        projections=2 * tokens * weights,
        attention=2 * attended,
        head=2 * tokens * config.d_model * config.padded_vocab_size,
    )


def _visible_pairs(length: int, window: int | None) -> int:
    """Returns how many pairs of a query and a key that it sees a sequence has."""
    hidden = max(0, length - (window or length))
    return (length * (length + 1) - hidden * (hidden + 1)) // 2
