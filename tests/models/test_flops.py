import dataclasses

import pytest

from taid_jax.models.config import DecoderConfig
from taid_jax.models.flops import forward_flops


@pytest.fixture
def config():
    return DecoderConfig(
        vocab_size=10,
        d_model=4,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        mlp_dim=6,
        max_position_embeddings=8,
    )


def test_forward_flops_counts_products_by_hand(config):
    # A layer: q and o 4x4 each, k and v 4x2 each, three of 4x6; the head 4x10.
    weights = 2 * (16 + 16 + 8 + 8 + 3 * 24) + 40
    # Three tokens: 1 + 2 + 3 pairs, two products of 2 numbers, two heads, two layers.
    attended = 6 * 2 * 2 * 2 * 2
    assert sum(forward_flops(config, 1, 3)) == 2 * (3 * weights + attended)
    assert sum(forward_flops(config, 5, 3)) == 5 * sum(forward_flops(config, 1, 3))


def test_forward_flops_window_leaves_fewer_pairs(config):
    whole = forward_flops(config, 1, 5)
    windowed = dataclasses.replace(config, window=2, window_layers=(True, False))
    found = forward_flops(windowed, 1, 5)
    # Of 15 pairs, a window of two leaves 1 + 4 * 2 = 9.
    assert found.attention * 30 == whole.attention * (15 + 9)
    assert found[::2] == whole[::2]
