"""Masks, weights and sums; and what every objective keeps of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.loss import (
    CrossEntropy,
    ForwardKL,
    Mix,
    distillation_loss,
    distillation_sums,
)

MASK = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 0, 1]])
BOTH = pytest.mark.parametrize("kind", ["taid", "cross_entropy"], indirect=True)
"""With a teacher, and with labels."""


@BOTH
def test_distillation_loss_is_the_mean_over_counted_tokens(
    kind, make_inputs, mean_loss, evaluate
):
    inputs = make_inputs()
    losses, gradient = evaluate(
        kind.objective, inputs.student, inputs.teacher, inputs.labels
    )
    value, mean_gradient = mean_loss(kind.objective, inputs, MASK)
    # Summing ten numbers in another order: a few units in the last place.
    np.testing.assert_allclose(value, losses[MASK == 1].mean(), rtol=1e-6)
    np.testing.assert_allclose(
        mean_gradient, gradient * MASK[..., None] / MASK.sum(), rtol=1e-5, atol=1e-9
    )


@BOTH
def test_distillation_loss_ignores_what_masked_tokens_hold(
    kind, make_inputs, mean_loss
):
    expected = mean_loss(kind.objective, make_inputs(), MASK)
    # Of a label that is none the loss is NaN, whatever the logits are.
    for bad, label in ((np.nan, -100), (np.inf, 10**6), (-np.inf, -100)):
        dirty = make_inputs()
        dirty.student[MASK == 0] = bad
        dirty.teacher[MASK == 0] = bad
        dirty.labels[MASK == 0] = label
        value, gradient = mean_loss(kind.objective, dirty, MASK)
        np.testing.assert_array_equal(value, expected[0])
        np.testing.assert_array_equal(gradient, expected[1])
        assert not gradient[MASK == 0].any()
        # Nothing counts.
        value, gradient = mean_loss(kind.objective, dirty, np.zeros_like(MASK))
        assert value == 0
        assert not gradient.any()
    dirty.student[0, 0, 3] = np.nan
    value, _ = mean_loss(kind.objective, dirty, MASK)
    assert np.isnan(value)


@pytest.mark.parametrize("dtype", [bool, jnp.bfloat16])
def test_distillation_loss_takes_masks_of_any_dtype(make_inputs, mean_loss, dtype):
    inputs = make_inputs()
    expected = mean_loss(ForwardKL(), inputs, MASK)
    value, gradient = mean_loss(ForwardKL(), inputs, MASK.astype(dtype))
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])


def test_distillation_loss_weighs_tokens(make_inputs, mean_loss, evaluate):
    inputs = make_inputs()
    weights = np.linspace(0, 2, 10, dtype=np.float32).reshape(2, 5)
    losses, _ = evaluate(ForwardKL(), inputs.student, inputs.teacher)
    value, _ = mean_loss(ForwardKL(), inputs, weights)
    expected = (losses * weights).sum() / weights.sum()
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # order of a sum


def test_distillation_sums_of_parts_add_up_to_the_whole(make_inputs):
    """Unequal parts: a mean of their means would weigh tokens differently."""
    inputs = make_inputs()
    mask = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    objective = Mix(ForwardKL(), 0.5)

    @jax.jit
    def part(student, teacher, mask, labels):
        def loss(student):
            return distillation_sums(objective, student, teacher, mask, labels)

        (total, sums), gradient = jax.value_and_grad(loss, has_aux=True)(student)
        return total, sums, gradient

    args = (inputs.student, inputs.teacher, mask, inputs.labels)
    total, sums, gradient = part(*map(jnp.asarray, args))
    parts = [part(*(jnp.asarray(x[i : i + 1]) for x in args)) for i in range(2)]
    # Order of a sum.
    np.testing.assert_allclose(sum(p[0] for p in parts), total, rtol=1e-6)
    for name, value in sums.items():
        added = sum(p[1][name] for p in parts)
        np.testing.assert_allclose(added, value, rtol=1e-6)
    both = np.concatenate([p[2] for p in parts])
    np.testing.assert_allclose(both, gradient, rtol=1e-6, atol=1e-12)
    assert sums["num_tokens"] == 5


def test_distillation_sums_gives_metrics_without_gradient(make_inputs):
    inputs = make_inputs()
    objective = Mix(ForwardKL(), 0.5)

    def metrics(student):
        _, sums = distillation_sums(
            objective,
            student,
            jnp.asarray(inputs.teacher),
            jnp.asarray(MASK),
            jnp.asarray(inputs.labels),
        )
        return sum(sums.values())

    gradient = jax.jit(jax.grad(metrics))(jnp.asarray(inputs.student))
    np.testing.assert_array_equal(gradient, np.zeros_like(inputs.student))


def test_distillation_loss_of_no_tokens_is_zero():
    logits, labels = jnp.zeros((0, 7)), jnp.zeros((0,), jnp.int32)
    loss = jax.jit(distillation_loss)
    assert loss(Mix(ForwardKL(), 0.5), logits, logits, labels=labels) == 0


def test_distillation_loss_takes_any_number_of_token_axes(make_inputs):
    inputs = make_inputs()
    run = jax.jit(distillation_sums)
    flat, deep = (
        run(ForwardKL(), inputs.student.reshape(shape), inputs.teacher.reshape(shape))
        for shape in ((10, 33), (1, 2, 5, 33))
    )
    np.testing.assert_allclose(flat[0], deep[0], rtol=1e-6)  # order of a sum
    one = [jnp.asarray(x[0, 0]) for x in (inputs.student, inputs.teacher)]
    assert jax.eval_shape(distillation_loss, ForwardKL(), *one).shape == ()


def test_distillation_loss_reports_shapes_that_do_not_match():
    student, objective = jnp.zeros((2, 5, 33)), ForwardKL()
    with pytest.raises(ValueError, match=r"\(2, 5, 33\).*\(2, 5, 40\)"):
        distillation_loss(objective, student, jnp.zeros((2, 5, 40)))
    with pytest.raises(ValueError, match=r"mask.*\(2, 5\).*\(2, 4\)"):
        distillation_loss(objective, student, student, jnp.ones((2, 4)))
    labels = jnp.zeros((2, 6), jnp.int32)
    with pytest.raises(ValueError, match=r"labels.*\(2, 5\).*\(2, 6\)"):
        distillation_loss(objective, student, student, labels=labels)


@BOTH
@pytest.mark.parametrize("mask", [None, np.ones_like(MASK)])
def test_distillation_loss_does_not_count_labels_to_be_ignored(
    kind, make_inputs, mean_loss, mask
):
    inputs = make_inputs()
    expected = mean_loss(kind.objective, inputs, MASK)
    inputs.labels[MASK == 0] = -100
    inputs.student[MASK == 0] = inputs.teacher[MASK == 0] = np.nan
    value, gradient = mean_loss(kind.objective, inputs, mask)
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])
    inputs.labels[...] = -100
    value, gradient = mean_loss(kind.objective, inputs, mask)
    assert value == 0
    assert not gradient.any()


def test_distillation_loss_without_a_teacher_needs_none():
    logits, labels = jnp.zeros((5, 7)), jnp.full((5,), -100, jnp.int32)
    assert distillation_loss(CrossEntropy(), logits, None, labels=labels) == 0
    with pytest.raises(ValueError, match="teacher_logits, got None"):
        distillation_loss(ForwardKL(), logits, None, labels=labels)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_distillation_sums_do_not_hide_nan_in_a_metric(make_inputs, side):
    inputs = make_inputs()
    getattr(inputs, side)[0, 0] = np.nan
    arrays = map(jnp.asarray, (inputs.student, inputs.teacher, MASK, inputs.labels))
    loss_sum, sums = jax.jit(distillation_sums)(Mix(ForwardKL(), 0.5), *arrays)
    assert np.isnan(loss_sum)
    assert np.isnan(sums["kl_teacher"])
    assert np.isnan(sums["distil_loss"])
    assert sums["num_tokens"] == int(MASK.sum())
