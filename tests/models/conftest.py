"""Tiny models on disk: recorded ones, and fresh ones written by transformers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parents[2] / "parity" / "golden"

TINY = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
"""A Llama with grouped queries, small enough for a test."""


@pytest.fixture(scope="session")
def random_params():
    """Returns a function that makes parameters of an architecture, nothing compiled."""
    from taid_jax.models.decoder import abstract_params

    def make(config, seed=0, dtype=np.float32):
        generator = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), dtype),
            abstract_params(config),
        )

    return make


@pytest.fixture(scope="session")
def golden_teacher():
    """A folder that transformers wrote, recorded with the project."""
    return GOLDEN / "run_taid" / "teacher"


@pytest.fixture
def tiny_settings():
    """The settings of the tiny Llama, as config.json has them."""
    return dict(TINY)


@pytest.fixture(scope="session")
def write_llama():
    """Returns a function that writes a random Llama as transformers does."""
    reason = "PyTorch writes the reference model, and this environment has none"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers")

    def write(folder, *, dtype="float32", max_shard_size="5GB", seed=0, **changes):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**{**TINY, **changes})
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                # Norms start at one and biases at zero, which would hide mistakes.
                if tensor.ndim == 1:
                    tensor.add_(0.3 * torch.randn_like(tensor))
        model = model.to(getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return model

    return write
