"""The fused head against the plain form, whatever it takes at once and counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss

TOKENS, VOCAB = (4, 12), 37
"""As `arrays` makes them."""


@pytest.mark.parametrize("chunk_size", [1, 7, None])
def test_fused_loss_does_not_depend_on_the_chunk(
    arrays, fused, plain, both, agree, chunk_size
):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))
    found = both(fused, a, objective, chunk_size=chunk_size)
    agree(found, both(plain, a, objective))


@pytest.mark.parametrize("mask", ["none", "weights", "all", "empty"])
def test_fused_loss_masks(arrays, fused, plain, both, agree, mask):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))
    weights = {
        "none": None,
        "weights": jnp.asarray(np.random.default_rng(1).random(TOKENS), jnp.float32),
        "all": jnp.ones(TOKENS, jnp.int32),
        "empty": jnp.zeros(TOKENS, bool),
    }[mask]
    found = both(fused, a, objective, mask=weights, chunk_size=8)
    agree(found, both(plain, a, objective, mask=weights))
    if mask == "empty":
        assert found[0] == 0
        assert not any(np.any(np.asarray(g)) for g in found[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_fused_loss_masked_tokens_may_hold_anything(arrays, fused, both, agree, bad):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))
    expected = both(fused, a, objective, chunk_size=8)
    out = ~a["mask"][..., None]
    a["student"] = jnp.where(out, bad, a["student"])
    a["teacher"] = jnp.where(out, bad, a["teacher"])
    found = both(fused, a, objective, chunk_size=8)
    agree(found, expected)


@pytest.mark.parametrize("transposed", [False, True], ids=["kernel", "table"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_fused_loss_of_many_chunks_is_the_plain_form(
    arrays, fused, plain, agree, small_chunks, masked, transposed
):
    a, objective = arrays(tokens=(700,)), loss.Mix(loss.ForwardKL(), 0.5)
    bias = jnp.linspace(-1, 1, VOCAB)

    def of(function, mask, hidden, kernel, bias):
        if transposed:
            head = {"transposed": function is fused}
        else:
            head = {"bias": bias, "softcap": 20.0}
        return function(a, objective, hidden, kernel, mask=mask, head=head)

    @jax.jit
    def run(mask):
        return [
            jax.value_and_grad(
                functools.partial(of, function, mask), (0, 1, 2), has_aux=True
            )(a["student"], a["kernel"], bias)
            for function in (fused, plain)
        ]

    order = np.random.default_rng(2).permutation(700)
    # No token, some of the first chunk, all of it, some of later ones, all.
    for counted in (0, 5, 117, 250, 700) if masked else (700,):
        found, expected = run(jnp.asarray(order < counted) if masked else None)
        agree((*found[0], found[1]), (*expected[0], expected[1]))


def test_fused_loss_of_no_tokens_is_zero(arrays, fused, both):
    a, objective = arrays(tokens=(0,)), loss.TAID(jnp.float32(0.4))
    value, sums, grads = both(fused, a, objective)
    assert value == 0
    assert sums["num_tokens"] == 0
    assert not np.any(grads[1])
