"""DistiLLM-2's loss of pairs of texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.loss import (
    SequenceWeighted,
    SkewForwardKL,
    SkewReverseKL,
    distillm2_weight,
)

pytestmark = pytest.mark.optimised

FROM_STUDENT = np.array([False, True, False, True])


@pytest.fixture
def batch(make_inputs):
    """Four texts of unequal length; the teacher knows half of the labels well."""
    inputs = make_inputs((4, 6, 17), 1.0)
    counted = np.arange(6) < np.array([[6], [4], [3], [5]])
    inputs.labels[~counted] = -100
    for text, side in enumerate((inputs.teacher, inputs.student) * 2):
        at = np.maximum(inputs.labels[text], 0)[:, None]
        height = np.take_along_axis(side[text], at, -1) + 2 + text
        np.put_along_axis(side[text], at, height.astype(np.float32), -1)
    return inputs.student, inputs.teacher, inputs.labels, FROM_STUDENT


@pytest.fixture(scope="session")
def run():
    """Losses of the texts, and the gradient of their sum in the student's logits."""

    @jax.jit
    def run(loss, student, *others):
        def total(student):
            losses = loss(student, *others)
            return jnp.sum(losses), losses

        gradient, losses = jax.grad(total, has_aux=True)(student)
        return losses, gradient

    def run_on(loss, arrays):
        return tuple(map(np.asarray, run(loss, *map(jnp.asarray, arrays))))

    return run_on


def _token_means(values, labels):
    counted = labels != -100
    shape = counted.sum(-1).reshape(-1, *[1] * (values.ndim - 1))
    where = counted.reshape(*counted.shape, *[1] * (values.ndim - 2))
    return np.where(where, values, 0) / shape


def test_sequence_weighted_is_a_skew_kl_of_each_text(batch, run, evaluate):
    student, teacher, labels, _ = batch
    losses, gradient = run(SequenceWeighted(1.25, skew=0.2), batch)
    weights = np.where(FROM_STUDENT, 1.25, 0.75)
    for text, (weight, own) in enumerate(zip(weights, FROM_STUDENT, strict=True)):
        objective = SkewReverseKL(0.2) if own else SkewForwardKL(0.2)
        values, slopes = evaluate(objective, student, teacher)
        expected = weight * _token_means(values, labels)[text].sum()
        np.testing.assert_allclose(losses[text], expected, rtol=3e-6)
        expected = weight * _token_means(slopes, labels)[text]
        np.testing.assert_allclose(gradient[text], expected, rtol=1e-5, atol=1e-8)


def test_sequence_weighted_fits_the_skew_of_each_text(batch, run, oracle):
    student, teacher, labels, _ = batch

    def likelihood(logits):
        logits = logits.astype(float)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        at = np.take_along_axis(logprobs, np.maximum(labels, 0)[..., None], -1)[..., 0]
        return np.exp(_token_means(at, labels).sum(-1))

    margins = likelihood(teacher) - likelihood(student)
    margins[FROM_STUDENT] *= -1
    # Something of all that can happen: in between, the least, the most.
    of_teacher, of_student = 1.2 * float(margins[0]), 1.5 * float(margins[1])
    loss = SequenceWeighted(1.0, 0.3, of_teacher, of_student)
    found = jax.jit(SequenceWeighted.margins)(loss, *map(jnp.asarray, batch))
    np.testing.assert_allclose(found, margins, rtol=1e-5, atol=1e-7)
    in_student = jax.jit(jax.grad(lambda s, *rest: loss.margins(s, *rest).sum()))
    assert not in_student(*map(jnp.asarray, batch)).any()
    of_side = np.where(FROM_STUDENT, of_student, of_teacher)
    skews = np.clip(1 - 0.7 * of_side / (margins + 1e-5), 0.01, 0.3)
    np.testing.assert_allclose(skews[:3], [0.16, 0.01, 0.3], atol=1e-3)
    losses, gradient = run(loss, batch)
    for text, (skew, own) in enumerate(zip(skews, FROM_STUDENT, strict=True)):
        name = "skew_reverse_kl" if own else "skew_forward_kl"
        values, slopes = oracle(
            name,
            student[text : text + 1],
            teacher[text : text + 1],
            teacher_weight=skew,
        )
        own_labels = labels[text : text + 1]
        expected = _token_means(values, own_labels).sum()
        np.testing.assert_allclose(losses[text], expected, rtol=1e-5)
        # The skew has no gradient.
        expected = _token_means(slopes, own_labels)[0]
        np.testing.assert_allclose(gradient[text], expected, rtol=1e-4, atol=1e-7)


def test_sequence_weighted_tokens_that_do_not_count_may_hold_anything(batch, run):
    student, teacher, labels, own = batch
    labels[2] = -100
    loss = SequenceWeighted(1.5, teacher_margin=0.2, student_margin=0.2)
    expected = run(loss, batch)
    assert expected[0][2] == 0
    assert not expected[1][2].any()
    student[labels == -100] = teacher[labels == -100] = np.nan
    found = run(loss, (student, teacher, labels, own))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    # One that counts is seen, and in its text alone.
    teacher[1, 0, 0] = np.nan
    losses, _ = run(loss, (student, teacher, labels, own))
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False, False])


def test_distillm2_weight_rises_over_the_first_half():
    found = [float(distillm2_weight(step, 200)) for step in (0, 50, 100, 150, 300)]
    assert found == [1.0, 1.25, 1.5, 1.5, 1.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"from_student": (3,)}, r"from_student of shape \(batch,\), got .* \(3,\)"),
        ({"labels": (4, 5)}, r"labels of shape \(4, 6\)"),
        ({"teacher": (4, 6, 16)}, "logits of one shape"),
    ],
)
def test_sequence_weighted_misuse_names_the_shapes(change, message):
    shapes = {"student": (4, 6, 17), "teacher": (4, 6, 17), "labels": (4, 6)}
    shapes |= {"from_student": (4,)} | change
    dtypes = {"labels": "int32", "from_student": "bool"}
    arrays = [jnp.zeros(x, dtypes.get(k, "float32")) for k, x in shapes.items()]
    with pytest.raises(ValueError, match=message):
        SequenceWeighted()(*arrays)
