"""Packed, padded or in buckets: the same loss, token for token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss
from taid_jax.data import held_out_batches, load_dataset
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import decoder_functions, init_params
from taid_jax.train.step import batch_loss


@pytest.fixture(scope="module")
def step():
    """`step(batch)`: the loss and the weight of a batch, and the gradient."""
    config = DecoderConfig(
        vocab_size=512,
        d_model=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=32,
        max_position_embeddings=256,
        tie_embeddings=True,
        initializer_range=1.0,
    )
    teacher, student = (init_params(config, jax.random.key(seed)) for seed in (0, 1))
    functions = decoder_functions(config)

    @jax.jit
    def run(batch):
        def scalar(params):
            value, sums = batch_loss(
                loss.TAID(0.4), functions, params, functions, teacher, batch
            )
            return value, sums["num_tokens"]

        return jax.value_and_grad(scalar, has_aux=True)(student)

    return run


def total(step, batches):
    """Returns the summed loss, the counted tokens, and the summed gradient."""
    value, weight, gradient = 0.0, 0.0, 0.0
    for batch in batches:
        (part, count), slope = step(jax.tree.map(jnp.asarray, batch))
        value, weight = value + float(part), weight + float(count)
        leaves = [
            np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(slope)
        ]
        gradient = gradient + np.concatenate(leaves)
    return value, weight, gradient


@pytest.mark.slow
def test_loss_does_not_depend_on_how_rows_are_laid_out(
    step, write_jsonl, make_conversations, tokenizer
):
    conversations = make_conversations(12, edges=[""])
    source = write_jsonl([{"messages": messages} for messages in conversations])
    layouts = {
        "padded": {"pack": False},
        "packed": {"pack": True},
        "buckets": {"pack": False, "buckets": (128,)},
    }
    found, shapes = {}, {}
    for name, layout in layouts.items():
        side = load_dataset(
            source, tokenizer, seq_len=256, held_out_fraction=0.0, **layout
        ).train
        batches = held_out_batches(side, 2)
        shapes[name] = [batch["input_ids"].shape[1] for batch in batches]
        found[name] = total(step, batches)
        if name == "packed":
            # One segment throughout, so that examples see those before them.
            for batch in batches:
                batch["segment_ids"] = (batch["segment_ids"] > 0).astype(np.int32)
            found["mistaken"] = total(step, batches)
    assert len(shapes["packed"]) < len(shapes["padded"])
    assert len(set(shapes["buckets"])) > 1
    value, weight, gradient = found["padded"]
    for name in ("packed", "buckets"):
        other_value, other_weight, other_gradient = found[name]
        assert other_weight == weight, name
        # float32 sums over some thousand tokens in another order.
        assert other_value == pytest.approx(value, rel=1e-5), name
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(other_gradient / scale, gradient / scale, atol=1e-5)
    # Ten times what is let pass above.
    assert found["mistaken"][0] != pytest.approx(value, rel=1e-4)
    assert np.abs(found["mistaken"][2] - gradient).max() / scale > 1e-4
