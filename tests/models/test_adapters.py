import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from taid_jax.models.adapters import linen_functions, nnx_functions
from taid_jax.types import Head

VOCAB, D = 23, 16
IDS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (3, 7)), jnp.int32)


class LinenModel(linen.Module):
    to_logits: bool = True

    @linen.compact
    def __call__(self, ids):
        x = linen.Embed(VOCAB, D)(ids)
        x = x + linen.Dense(D)(jnp.tanh(x))
        head = linen.Dense(VOCAB, use_bias=False, name="head")
        return head(x) if self.to_logits else x


class NnxModel(nnx.Module):
    def __init__(self, rngs, to_logits=True):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.dense = nnx.Linear(D, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(D, VOCAB, use_bias=False, rngs=rngs)
        self.to_logits = to_logits

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.dropout(self.dense(jnp.tanh(x)))
        return self.head(x) if self.to_logits else x


def make_linen(to_logits):
    params = LinenModel().init(jax.random.key(0), IDS)["params"]
    head = None if to_logits else (lambda params: Head(params["head"]["kernel"]))
    return params, linen_functions(LinenModel(to_logits), head=head)


def make_nnx(to_logits):
    head = None if to_logits else (lambda params: Head(params["head"]["kernel"]))
    return nnx_functions(NnxModel(nnx.Rngs(0), to_logits), head=head)


@pytest.mark.parametrize("make", [make_linen, make_nnx])
def test_functions_with_a_head_give_the_logits_of_the_whole_model(make):
    params, plain = make(to_logits=True)
    _, split = make(to_logits=False)
    assert isinstance(params, dict)
    assert plain.hidden is None
    assert split.logits is None
    batch = {"input_ids": IDS}
    logits = split.head(params).logits(split.hidden(params, batch))
    np.testing.assert_allclose(logits, plain.logits(params, batch), rtol=1e-5)


def test_nnx_functions_call_the_model_as_it_was():
    model = NnxModel(nnx.Rngs(3))
    params, functions = nnx_functions(model)
    np.testing.assert_array_equal(
        functions.logits(params, {"input_ids": IDS}), model(IDS)
    )


def test_linen_functions_call_with_what_the_batch_holds():
    params = LinenModel().init(jax.random.key(0), IDS)["params"]
    functions = linen_functions(
        LinenModel(), call=lambda model, batch: model(batch["other"])
    )
    expected = LinenModel().apply({"params": params}, IDS[:, ::-1])
    np.testing.assert_array_equal(
        functions.logits(params, {"other": IDS[:, ::-1]}), expected
    )
