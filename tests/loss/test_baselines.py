"""Next-token cross-entropy, CTKD and DKD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.loss import (
    CTKD,
    DKD,
    CrossEntropy,
    ForwardKL,
    Mix,
    ctkd_strength,
    distillation_loss,
)

pytestmark = pytest.mark.optimised


def test_cross_entropy_closed_form_and_its_digits(evaluate):
    """1 - q of the label is 1e-13 here; a subtraction would give 0 or 6e-8."""
    label = np.array([0], np.int32)
    student = np.array([[1.0, 0.0, -np.inf]], np.float32)
    losses, gradient = evaluate(CrossEntropy(), student, student, label)
    np.testing.assert_allclose(losses[0], np.log1p(np.exp(-1.0)), rtol=1e-6)
    q = 1 / (1 + np.e)
    np.testing.assert_allclose(gradient[0], [-q, q, 0], rtol=1e-6)
    # A label that the student has no entry for takes no part.
    losses, gradient = evaluate(CrossEntropy(), student, student, label + 2)
    assert losses[0] == 0
    assert gradient[0, 2] == 0
    student = np.array([[30.0, 0.0, -1.0]], np.float32)
    _, gradient = evaluate(CrossEntropy(), student, student, label)
    rest = np.exp([-30.0, -31.0])
    np.testing.assert_allclose(gradient[0, 0], -rest.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 1:], rest, rtol=1e-6)


LABELLED = [CrossEntropy(), DKD(), Mix(ForwardKL(), 0.5)]


@pytest.mark.parametrize(
    ("objective", "vocab", "dtype"),
    [
        *((objective, 33, np.int32) for objective in LABELLED),
        (CrossEntropy(), 300, np.int8),  # more entries than int8 has numbers
    ],
)
def test_labels_that_do_not_count_give_neither_loss_nor_gradient(
    make_inputs, evaluate, objective, vocab, dtype
):
    inputs = make_inputs((2, 5, vocab))
    labels = (inputs.labels % 128).astype(dtype)
    expected = evaluate(objective, inputs.student, inputs.teacher, labels)
    labels = np.where([[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]], -100, labels).astype(dtype)
    losses, gradient = evaluate(objective, inputs.student, inputs.teacher, labels)
    ignored = labels == -100
    assert not losses[ignored].any()
    assert not gradient[ignored].any()
    np.testing.assert_array_equal(losses[~ignored], expected[0][~ignored])
    np.testing.assert_array_equal(gradient[~ignored], expected[1][~ignored])


@pytest.mark.parametrize("objective", LABELLED)
def test_labels_outside_the_vocabulary_give_nan(make_inputs, evaluate, objective):
    inputs = make_inputs()
    expected = evaluate(objective, inputs.student, inputs.teacher, inputs.labels)
    labels = inputs.labels.copy()
    labels[0, 1:4], labels[1, 2:] = (-1, 33, -99), (10**6, -101, 34)
    losses, gradient = evaluate(objective, inputs.student, inputs.teacher, labels)
    known = labels == inputs.labels
    assert np.isnan(losses[~known]).all()
    assert np.isnan(gradient[~known]).all()
    np.testing.assert_array_equal(losses[known], expected[0][known])
    np.testing.assert_array_equal(gradient[known], expected[1][known])


@pytest.mark.parametrize("objective", [CrossEntropy(), DKD()])
def test_missing_labels_are_reported_with_the_shapes(objective):
    logits = jnp.zeros((2, 5, 33))
    name = type(objective).__name__
    with pytest.raises(ValueError, match=rf"{name} needs labels .*\(2, 5\).*None"):
        objective(logits, logits)
    with pytest.raises(ValueError, match=rf"{name} needs labels"):
        jax.eval_shape(lambda x: distillation_loss(objective, x, x), logits)


def test_cross_entropy_needs_no_teacher(make_inputs):
    inputs = make_inputs()
    student, labels = jnp.asarray(inputs.student), jnp.asarray(inputs.labels)
    run = jax.jit(CrossEntropy())
    np.testing.assert_array_equal(
        run(student, None, labels),
        run(student, jnp.full_like(student, jnp.nan), labels),
    )


def test_ctkd_slope_in_its_temperature_is_exact_and_reversed(make_inputs, oracle):
    strength = 0.7

    @jax.jit
    @jax.grad
    def slope_of(objective, student, teacher):
        return jnp.sum(objective(student, teacher))

    for noise in (None, 0.1):
        inputs = make_inputs((4, 33), noise=noise)
        rows = inputs.student, inputs.teacher
        for temperature in (1.5, 4.0, 20.0):
            objective = CTKD(jnp.float32(temperature), jnp.float32(strength))
            found = slope_of(objective, *map(jnp.asarray, rows))
            high, low = (
                oracle("ctkd", *rows, temperature=temperature + step)[0].sum()
                for step in (1e-5, -1e-5)
            )
            slope = (high - low) / 2e-5
            # Two terms of opposite sign, each some hundred nats.
            np.testing.assert_allclose(found.temperature, -strength * slope, rtol=1e-5)
            assert found.strength == 0


def test_ctkd_strength_rises_by_a_cosine_over_ten_epochs():
    epochs = jnp.array([0.0, 2.5, 5.0, 10.0, 25.0])
    quarter = 0.5 * (1 - np.cos(np.pi / 4))
    np.testing.assert_allclose(
        ctkd_strength(epochs), [0, quarter, 0.5, 1, 1], atol=1e-7
    )
    assert ctkd_strength(1, num_epochs=2) == pytest.approx(0.5)
