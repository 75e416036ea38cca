"""Vocabularies: padding takes no part, and another tokenizer's is grown or cut."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import (
    abstract_params,
    head,
    param_axes,
)
from taid_jax.models.files.load import export_model, load_model
from taid_jax.models.files.vocabulary import (
    count_tokens,
    resize_vocabulary,
    with_tokenizer,
)
from taid_jax.models.generation import generate, prepare
from taid_jax.sharding import make_mesh, tree_shardings

CONFIG = DecoderConfig(
    vocab_size=40,
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=12,
    max_position_embeddings=64,
)
TOKENS = 33


def make_tokenizer(size=TOKENS):
    vocab = {chr(97 + index): index for index in range(size)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a")


def small(config):
    """The same architecture without padding."""
    return dataclasses.replace(config, vocab_size=TOKENS, padded_vocab_size=TOKENS)


def test_count_tokens_counts_the_ids_that_are_left_out():
    vocab = {"a": 0, "b": 7}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Backend(models.BPE(vocab=vocab, merges=[]))
    )
    assert len(tokenizer) == 2
    assert count_tokens(tokenizer) == 8


def test_with_tokenizer_marks_the_padding_and_nothing_else():
    config = with_tokenizer(CONFIG, make_tokenizer())
    assert config == dataclasses.replace(CONFIG, vocab_size=TOKENS)
    assert with_tokenizer(CONFIG, make_tokenizer(40)) == CONFIG


def test_with_tokenizer_refuses_ids_without_an_embedding():
    with pytest.raises(ModelError, match=r"40 embeddings, .* ids up to 40.*resize"):
        with_tokenizer(CONFIG, make_tokenizer(41))


@pytest.mark.parametrize("tied", [False, True])
def test_export_model_leaves_the_padding_out(tmp_path, random_params, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = random_params(config)
    export_model(tmp_path / "padded", config, params)  # No tokenizer: all are real.
    make_tokenizer().save_pretrained(tmp_path / "padded")
    loaded = load_model(tmp_path / "padded")
    assert loaded.config == dataclasses.replace(config, vocab_size=TOKENS)
    export_model(tmp_path / "m", loaded.config, loaded.params, loaded.tokenizer)
    again = load_model(tmp_path / "m")
    assert again.config == small(config)
    cut = resize_vocabulary(params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, again.params, cut)
    # The rows that there are are all that a softmax of others sees.
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    assert values["vocab_size"] == TOKENS


@pytest.mark.multidevice
def test_export_model_leaves_out_the_padding_of_parameters_on_a_mesh(
    tmp_path, random_params
):
    config = dataclasses.replace(CONFIG, vocab_size=TOKENS)
    params = random_params(config)
    export_model(tmp_path / "one", config, params)
    mesh = make_mesh("data=1,fsdp=4,tensor=2")
    where = tree_shardings(param_axes(config), abstract_params(config), mesh)
    export_model(tmp_path / "many", config, jax.device_put(params, where))
    jax.tree.map(
        np.testing.assert_array_equal,
        load_model(tmp_path / "many").params,
        load_model(tmp_path / "one").params,
    )


def test_generate_never_gives_a_padded_id(random_params):
    params = random_params(CONFIG)
    kernel = params["lm_head"]["kernel"]
    # Twice the largest column of a real token: it wins wherever it takes part at all.
    best = 2 * jnp.concatenate([kernel[:, :3], -kernel[:, :4]], axis=1)
    params["lm_head"] = {"kernel": kernel.at[:, TOKENS:].set(best)}
    prompt = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)

    def answer(config):
        return generate(
            prepare(params, config, unroll=False),
            config,
            prompt,
            jnp.ones_like(prompt),
            max_new_tokens=8,
            eos_token_ids=(),
            pad_token_id=0,
        ).tokens

    assert (answer(CONFIG) >= TOKENS).any()
    marked = dataclasses.replace(CONFIG, vocab_size=TOKENS)
    assert (answer(marked) < TOKENS).all()


@pytest.mark.parametrize("tied", [False, True])
def test_resize_vocabulary_adds_the_mean_of_what_there_was(random_params, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = random_params(config)
    grown = resize_vocabulary(params, 50)
    old, new = params["embed"]["embedding"], grown["embed"]["embedding"]
    np.testing.assert_array_equal(new[:40], old)
    # A mean of 40 float32 numbers, added up in another order.
    expected = np.asarray(old, np.float64).mean(axis=0)
    np.testing.assert_allclose(new[45], expected, rtol=1e-4, atol=1e-6)
    config = dataclasses.replace(config, vocab_size=50, padded_vocab_size=50)
    kernel, before = (
        np.moveaxis(np.asarray(own.kernel), own.axes[0], 0)
        for own in (head(grown, config), head(params, config))
    )
    assert kernel.shape == (16, 50)
    np.testing.assert_array_equal(kernel[:, :40], before[:, :40])
    np.testing.assert_allclose(
        kernel[:, 49], before[:, :40].mean(axis=1), rtol=1e-4, atol=1e-6
    )


def test_resize_vocabulary_cuts_off_what_is_too_much(random_params):
    params = random_params(CONFIG)
    params["lm_head"]["bias"] = jnp.arange(40.0)
    cut = resize_vocabulary(params, 7)
    np.testing.assert_array_equal(
        cut["embed"]["embedding"], params["embed"]["embedding"][:7]
    )
    np.testing.assert_array_equal(
        cut["lm_head"]["kernel"], params["lm_head"]["kernel"][:, :7]
    )
    np.testing.assert_array_equal(cut["lm_head"]["bias"], jnp.arange(7.0))


def test_resize_vocabulary_keeps_the_dtype_and_leaves_the_rest(random_params):
    params = random_params(CONFIG, dtype=jnp.bfloat16)
    grown = resize_vocabulary(params, 50)
    assert {leaf.dtype for leaf in jax.tree.leaves(grown)} == {jnp.dtype(jnp.bfloat16)}
    assert grown["layers"] is params["layers"]
    assert params["embed"]["embedding"].shape == (40, 16)
