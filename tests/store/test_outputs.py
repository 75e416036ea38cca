import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.store.format import LOGPROB_STEP
from taid_jax.store.outputs import (
    DRAWS,
    draws_of,
    hidden_outputs,
    is_finite,
    sampled_outputs,
    topk_outputs,
)
from taid_jax.types import Head, ModelFunctions

VOCAB = 40


@pytest.fixture
def teacher():
    """A teacher whose hidden states are its logits, of which the last four are none."""
    table = jnp.eye(VOCAB + 4)
    return ModelFunctions(
        hidden=lambda params, batch: params["hidden"],
        head=lambda _: Head(table, None, None, VOCAB),
    )


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(2, 6, VOCAB + 4)) * 3, "float32")


def test_topk_outputs_are_the_most_probable_and_the_rest(teacher, logits):
    columns, outputs = topk_outputs(teacher, VOCAB, 5)
    ids, steps, tail = map(np.asarray, jax.jit(outputs)({"hidden": logits}, {}))
    assert [c.dtype for c in columns] == [str(x.dtype) for x in (ids, steps, tail)]
    logprobs = jax.nn.log_softmax(logits[..., :VOCAB])
    expected = jnp.argsort(-logprobs, -1)[..., :5]
    np.testing.assert_array_equal(ids, expected)
    known = jnp.take_along_axis(logprobs, expected, -1)
    half = LOGPROB_STEP / 2 + 1e-6
    np.testing.assert_allclose(steps * -LOGPROB_STEP, known, rtol=0, atol=half)
    rest = jnp.log1p(-jnp.exp(known).sum(-1, keepdims=True))
    np.testing.assert_allclose(tail * -LOGPROB_STEP, rest, rtol=0, atol=half)


def test_topk_outputs_of_equal_entries_count_each_once(teacher):
    """Of many equal ones some are stored: the others are the rest."""
    _, outputs = topk_outputs(teacher, VOCAB, 4)
    _, steps, tail = map(
        np.asarray, outputs({"hidden": jnp.zeros((1, 1, VOCAB + 4))}, {})
    )
    total = 4 * np.exp(steps[0, 0, 0] * -LOGPROB_STEP) + np.exp(
        tail[0, 0, 0] * -LOGPROB_STEP
    )
    np.testing.assert_allclose(total, 1, atol=5e-4)


def test_sampled_outputs_are_drawn_as_often_as_they_are_probable(teacher, logits):
    draws = 16
    columns, outputs = sampled_outputs(teacher, VOCAB, draws)
    p = np.asarray(jax.nn.softmax(logits[..., :VOCAB]))
    sampled = jax.jit(outputs)
    mean = np.zeros(p.shape)
    comb = np.linspace(0, 1, 50, endpoint=False) + 0.01
    for shift in comb:
        batch = {DRAWS: jnp.full((2, 6), shift, "float32")}
        ids, counts = map(np.asarray, sampled({"hidden": logits}, batch))
        assert (counts.sum(-1) == draws).all()
        assert (ids[counts == 0] == columns[0].filler).all()
        found = np.zeros((2, 6, VOCAB))
        for place in np.ndindex(2, 6):
            there = counts[place] > 0
            found[place][ids[place][there]] = counts[place][there]
        # Systematic draws: never one away from what is expected.
        assert np.abs(found - draws * p).max() < 1 + 1e-4
        mean += found / draws / len(comb)
    # Over all shifts the mean is the probability, but for the steps of the comb.
    np.testing.assert_allclose(mean, p, atol=1 / draws / len(comb) + 1e-5)


def test_draws_are_an_examples_own():
    one, two = np.arange(5, dtype=np.int32), np.arange(1, 6, dtype=np.int32)
    np.testing.assert_array_equal(draws_of(one), draws_of(one.astype(np.int64)))
    assert (draws_of(one) != draws_of(two)).all()
    assert ((draws_of(one) >= 0) & (draws_of(one) < 1)).all()


@pytest.mark.parametrize("kind", ["hidden", "topk", "sampled"])
def test_outputs_that_are_no_numbers_are_known(teacher, logits, kind):
    """In fixed point NaN would be a probability like any other."""
    columns, outputs = {
        "hidden": lambda: hidden_outputs(teacher, VOCAB + 4, "bfloat16"),
        "topk": lambda: topk_outputs(teacher, VOCAB, 5),
        "sampled": lambda: sampled_outputs(teacher, VOCAB, 5),
    }[kind]()
    found = outputs({"hidden": logits.at[0, 3, 1].set(jnp.nan)}, {})
    rows = [
        is_finite(
            {c.name: np.asarray(x[row]) for c, x in zip(columns, found, strict=True)}
        )
        for row in (0, 1)
    ]
    assert rows == [False, True]
