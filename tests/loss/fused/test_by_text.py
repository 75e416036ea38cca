"""Two objectives in one batch: reduced form, fused form and float64 side by side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss
from taid_jax.types import Head

WEIGHT = 1.25
OBJECTIVE = loss.ByText(
    loss.SkewForwardKL(0.2), loss.SkewReverseKL(0.2), np.float32(WEIGHT)
)
# Texts of unequal lengths: three rows of several, one of a single text and padding.
SEGMENTS = np.array(
    [
        [1] * 5 + [2] * 4 + [3] * 3,
        [1] * 7 + [2] * 3 + [0] * 2,
        [1] * 2 + [2] * 10,
        [1] * 8 + [0] * 4,
    ],
    np.int32,
)
FROM_STUDENT = np.isin(SEGMENTS + 10 * np.arange(4)[:, None], [1, 12, 21, 31])


def _texts(segments, counted):
    """Which tokens each text has that counts anything."""
    rows = range(len(segments))
    found = [(row, text) for row in rows for text in np.unique(segments[row])]
    of_text = [
        counted & (segments == text) & (np.arange(4)[:, None] == row)
        for row, text in found
    ]
    return [each for each in of_text if each.any()]


@functools.partial(jax.jit, static_argnames=("fused", "chunk_size"))
def _run(a, objective, counted, segments, *, fused, chunk_size=None):
    def total(hidden, kernel):
        heads = Head(kernel), Head(a["teacher_kernel"])

        def over(objective, mask):
            if not fused:
                sides = heads[0].logits(hidden), heads[1].logits(a["teacher"])
                return loss.distillation_sums(objective, *sides, mask, a["labels"])
            outputs = (hidden, heads[0], a["teacher"], heads[1])
            return loss.fused_loss(
                objective, *outputs, mask, a["labels"], chunk_size=chunk_size
            )

        return objective.sums(over, counted, jnp.asarray(FROM_STUDENT), segments)

    one = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (value, sums), grads = one(a["student"], a["kernel"])
    return value, sums, grads


@pytest.fixture
def counted():
    counted = np.random.default_rng(3).random(SEGMENTS.shape) < 0.7
    counted[0, 5:9] = False  # a text of which nothing counts
    return counted & (SEGMENTS > 0)


@pytest.mark.parametrize(
    "packed", [pytest.param(True, marks=pytest.mark.optimised), False]
)
def test_by_text_fused_is_plain_is_float64(arrays, counted, oracle, agree, packed):
    a = arrays()
    mask, segments = jnp.asarray(counted), SEGMENTS if packed else None
    ids = None if segments is None else jnp.asarray(segments)
    texts = _texts(SEGMENTS if packed else np.zeros_like(SEGMENTS), counted)
    wide = {name: np.asarray(x, np.float64) for name, x in a.items()}
    student = wide["student"] @ wide["kernel"]
    teacher = wide["teacher"] @ wide["teacher_kernel"]
    parts = {"teacher": 0.0, "student": 0.0}
    in_logits = np.zeros_like(student)
    for name, who, weight in (
        ("skew_forward_kl", "teacher", 2 - WEIGHT),
        ("skew_reverse_kl", "student", WEIGHT),
    ):
        values, slopes = oracle(name, student, teacher, teacher_weight=0.2)
        for text in texts:
            own = text & ((who == "student") == FROM_STUDENT)
            parts[who] += weight * values[own].sum() / text.sum()
            in_logits[own] += weight * slopes[own] / text.sum()
    hidden = in_logits @ wide["kernel"].T
    kernel = np.einsum("bld,blv->dv", wide["student"], in_logits)
    plain = _run(a, OBJECTIVE, mask, ids, fused=False)
    np.testing.assert_allclose(plain[0], sum(parts.values()), rtol=1e-6)
    for who, part in parts.items():
        np.testing.assert_allclose(plain[1][f"{who}_texts_loss"], part, rtol=2e-6)
    np.testing.assert_allclose(plain[1]["num_tokens"], len(texts), rtol=1e-6)
    assert float(plain[1]["tokens"]) == counted.sum()
    mean = plain[1]["student_weight"] / plain[1]["num_tokens"]
    np.testing.assert_allclose(mean, WEIGHT, rtol=1e-6)
    agree(plain, (plain[0], plain[1], (hidden, kernel)))
    for chunk_size in (None, 5):
        found = _run(a, OBJECTIVE, mask, ids, fused=True, chunk_size=chunk_size)
        agree(found, plain)


def test_by_text_of_whole_rows_is_the_mean_of_sequence_weighted(arrays, counted):
    a = arrays()
    own = np.array([False, True, False, True])
    rows = np.broadcast_to(own[:, None], counted.shape)

    @jax.jit
    def both(student, teacher):
        labels = jnp.where(jnp.asarray(counted), a["labels"], -100)
        sequences = loss.SequenceWeighted(WEIGHT, skew=0.2)
        each = sequences(student, teacher, labels, jnp.asarray(own))

        def over(objective, mask):
            return loss.distillation_sums(objective, student, teacher, mask)

        total, sums = OBJECTIVE.sums(over, jnp.asarray(counted), jnp.asarray(rows))
        return jnp.mean(each), total / sums["num_tokens"]

    expected, found = both(
        a["student"] @ a["kernel"], a["teacher"] @ a["teacher_kernel"]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_by_text_tokens_that_do_not_count_may_hold_anything(arrays, counted):
    a, mask = arrays(), jnp.asarray(counted)
    expected = _run(a, OBJECTIVE, mask, None, fused=True)
    hole = jnp.where(mask[..., None], a["student"], jnp.nan)
    found = _run(a | {"student": hole}, OBJECTIVE, mask, None, fused=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    nothing = _run(a, OBJECTIVE, jnp.zeros_like(mask), None, fused=True)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))


def test_by_text_misuse_is_named(arrays):
    def over(objective, mask):
        return jnp.float32(0), {}

    bools, wide = jnp.zeros((2, 3), bool), jnp.zeros((2, 4), bool)
    with pytest.raises(TypeError, match="an array of bools for from_student"):
        OBJECTIVE.sums(over, bools, jnp.zeros((2, 3)))
    with pytest.raises(
        ValueError, match=r"one shape \(batch, length\), got .*\(2, 4\)"
    ):
        OBJECTIVE.sums(over, bools, wide)
    with pytest.raises(ValueError, match="student_weight"):
        loss.ByText(loss.ForwardKL(), loss.ReverseKL(), 2.5)
    a = arrays()
    heads = Head(a["kernel"]), Head(a["teacher_kernel"])
    with pytest.raises(TypeError):
        loss.fused_loss(OBJECTIVE, a["student"], heads[0], a["teacher"], heads[1])
