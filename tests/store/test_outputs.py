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

VOCAB, K, DRAWN = 40, 5, 16


@pytest.fixture(scope="module")
def outputs():
    """By kind: columns, and `run(logits, batch)` for a teacher with such logits.

    Its hidden states are its logits, of which the last four are none.
    """
    table = jnp.eye(VOCAB + 4)
    teacher = ModelFunctions(
        hidden=lambda params, batch: params["hidden"],
        head=lambda _: Head(table, None, None, VOCAB),
    )
    made = {
        "hidden": hidden_outputs(teacher, VOCAB + 4, "bfloat16"),
        "topk": topk_outputs(teacher, VOCAB, K),
        "sampled": sampled_outputs(teacher, VOCAB, DRAWN),
    }

    def runner(compiled):
        no_draws = {DRAWS: jnp.zeros((2, 6), "float32")}
        return lambda logits, batch=no_draws: [
            *map(np.asarray, compiled({"hidden": logits}, batch))
        ]

    return {kind: (columns, runner(jax.jit(f))) for kind, (columns, f) in made.items()}


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(2, 6, VOCAB + 4)) * 3, "float32")


def test_topk_outputs_are_the_most_probable_and_the_rest(outputs, logits):
    columns, run = outputs["topk"]
    ids, steps, tail = run(logits)
    assert [c.dtype for c in columns] == [str(x.dtype) for x in (ids, steps, tail)]
    logprobs = jax.nn.log_softmax(logits[..., :VOCAB])
    expected = jnp.argsort(-logprobs, -1)[..., :K]
    np.testing.assert_array_equal(ids, expected)
    known = jnp.take_along_axis(logprobs, expected, -1)
    half = LOGPROB_STEP / 2 + 1e-6
    np.testing.assert_allclose(steps * -LOGPROB_STEP, known, rtol=0, atol=half)
    rest = jnp.log1p(-jnp.exp(known).sum(-1, keepdims=True))
    np.testing.assert_allclose(tail * -LOGPROB_STEP, rest, rtol=0, atol=half)


def test_topk_outputs_of_equal_entries_count_each_once(outputs, logits):
    """Of many equal ones some are stored: the others are the rest."""
    _, steps, tail = outputs["topk"][1](jnp.zeros_like(logits))
    one, rest = (np.exp(x[0, 0, 0] * -LOGPROB_STEP) for x in (steps, tail))
    np.testing.assert_allclose(K * one + rest, 1, atol=5e-4)


def test_sampled_outputs_are_drawn_as_often_as_they_are_probable(outputs, logits):
    columns, run = outputs["sampled"]
    p = np.asarray(jax.nn.softmax(logits[..., :VOCAB]))
    mean = np.zeros(p.shape)
    comb = np.linspace(0, 1, 50, endpoint=False) + 0.01
    for shift in comb:
        batch = {DRAWS: jnp.full((2, 6), shift, "float32")}
        ids, counts = run(logits, batch)
        assert (counts.sum(-1) == DRAWN).all()
        assert (ids[counts == 0] == columns[0].filler).all()
        found = np.zeros((2, 6, VOCAB))
        for place in np.ndindex(2, 6):
            there = counts[place] > 0
            found[place][ids[place][there]] = counts[place][there]
        # Systematic draws: never one away from what is expected.
        assert np.abs(found - DRAWN * p).max() < 1 + 1e-4
        mean += found / DRAWN / len(comb)
    # Over all shifts the mean is the probability, but for the steps of the comb.
    np.testing.assert_allclose(mean, p, atol=1 / DRAWN / len(comb) + 1e-5)


def test_draws_are_an_examples_own():
    one, two = np.arange(5, dtype=np.int32), np.arange(1, 6, dtype=np.int32)
    np.testing.assert_array_equal(draws_of(one), draws_of(one.astype(np.int64)))
    assert (draws_of(one) != draws_of(two)).all()
    assert ((draws_of(one) >= 0) & (draws_of(one) < 1)).all()


@pytest.mark.parametrize("kind", ["hidden", "topk", "sampled"])
def test_outputs_that_are_no_numbers_are_known(outputs, logits, kind):
    """In fixed point NaN would be a probability like any other."""
    columns, run = outputs[kind]
    found = run(logits.at[0, 3, 1].set(jnp.nan))
    names = [column.name for column in columns]
    rows = [
        is_finite(dict(zip(names, (x[row] for x in found), strict=True)))
        for row in (0, 1)
    ]
    assert rows == [False, True]
