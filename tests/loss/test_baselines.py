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
    ctkd_temperature,
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


# Of 1 + 20 sigmoid(g) at g = 1.
TEMPERATURE_SLOPE = 20 * np.exp(-1) / (1 + np.exp(-1)) ** 2


@pytest.mark.parametrize("name", ["small", "neg_inf"])
def test_ctkd_slope_agrees_with_the_recorded_one(recorded, golden_losses, name):
    inputs = recorded(name)
    # Recorded in epoch 3 of 10 with the published ramp, which runs from 1 to 0.
    published_ramp = 0.5 * (1 + np.cos(0.3 * np.pi))

    @jax.jit
    @jax.grad
    def loss(objective):
        mask = jnp.asarray(golden_losses[f"{name}/mask"])
        return distillation_loss(objective, inputs.student, inputs.teacher, mask)

    objective = loss(CTKD(ctkd_temperature(1.0)))
    slope = golden_losses[f"{name}/ctkd/grad_temperature"] / published_ramp
    if np.isfinite(slope):
        # The published gradient is not reversed.
        raw_slope = objective.temperature * TEMPERATURE_SLOPE
        np.testing.assert_allclose(raw_slope, -slope, rtol=5e-6)
    assert np.isfinite(objective.temperature)
    assert objective.strength == 0


@pytest.mark.parametrize("noise", [None, 0.1])
def test_ctkd_slope_in_its_temperature_is_exact(make_inputs, oracle, noise):
    inputs = make_inputs((4, 33), noise=noise)
    strength = 0.7

    @jax.jit
    @jax.grad
    def slope_of(objective):
        return jnp.sum(
            objective(jnp.asarray(inputs.student), jnp.asarray(inputs.teacher))
        )

    for temperature in (1.5, 4.0, 20.0):
        found = slope_of(CTKD(jnp.float32(temperature), jnp.float32(strength)))
        arguments = ("ctkd", inputs.student, inputs.teacher)
        high, low = (
            oracle(*arguments, temperature=temperature + step)[0].sum()
            for step in (1e-5, -1e-5)
        )
        slope = (high - low) / 2e-5
        # Two terms of opposite sign, each some hundred nats.
        np.testing.assert_allclose(found.temperature, -strength * slope, rtol=1e-5)


def test_ctkd_leaves_the_students_gradient_alone(make_inputs, evaluate):
    inputs = make_inputs()
    temperature = 4.0
    expected = evaluate(ForwardKL(temperature), inputs.student, inputs.teacher)
    for strength in (0.0, 1.0):
        actual = evaluate(CTKD(temperature, strength), inputs.student, inputs.teacher)
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5, atol=1e-7)


def test_ctkd_learns_the_temperature_that_is_hardest(make_inputs):
    """A descent on the reversed gradient raises the loss."""
    inputs = make_inputs((4, 33))

    @jax.jit
    @jax.value_and_grad
    def loss(raw):
        objective = CTKD(ctkd_temperature(raw))
        return jnp.mean(
            objective(jnp.asarray(inputs.student), jnp.asarray(inputs.teacher))
        )

    raw = jnp.float32(1)
    values = []
    for _ in range(20):
        value, gradient = loss(raw)
        values.append(float(value))
        raw -= 1e-3 * gradient
    assert all(np.diff(values) > 0)


def test_ctkd_strength_rises_by_a_cosine_over_ten_epochs():
    epochs = jnp.array([0.0, 2.5, 5.0, 10.0, 25.0])
    quarter = 0.5 * (1 - np.cos(np.pi / 4))
    np.testing.assert_allclose(
        ctkd_strength(epochs), [0, quarter, 0.5, 1, 1], atol=1e-7
    )
    assert ctkd_strength(1, num_epochs=2) == pytest.approx(0.5)


def test_dkd_of_three_entries_is_what_the_definition_says(evaluate):
    q, p = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.4, 0.4])
    label = 0
    tckd = p[0] * np.log(p[0] / q[0]) + (1 - p[0]) * np.log((1 - p[0]) / (1 - q[0]))
    rest_q, rest_p = q[1:] / (1 - q[0]), p[1:] / (1 - p[0])
    nckd = (rest_p * np.log(rest_p / rest_q)).sum()
    logits = [np.log(x).astype(np.float32)[None] for x in (q, p)]
    loss, _ = evaluate(DKD(2.0, 3.0), *logits, np.array([label], np.int32))
    np.testing.assert_allclose(loss[0], 2 * tckd + 3 * nckd, rtol=1e-5)


def test_dkd_weighed_by_the_teachers_confidence_is_forward_kl(make_inputs, evaluate):
    """KL = TCKD + (1 - p of the label) NCKD: of two DKDs each part can be told."""
    inputs = make_inputs()
    arguments = (inputs.student, inputs.teacher, inputs.labels)
    tckd, in_tckd = evaluate(DKD(1.0, 0.0), *arguments)
    nckd, in_nckd = evaluate(DKD(0.0, 1.0), *arguments)
    logits = inputs.teacher.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    rest = 1 - np.take_along_axis(p, inputs.labels[..., None], -1)
    entropy = -(p * np.log(p)).sum(-1)
    loss, gradient = evaluate(ForwardKL(), inputs.student, inputs.teacher)
    # Three float32 numbers of some nats each.
    np.testing.assert_allclose(
        tckd + rest[..., 0] * nckd, loss - entropy, rtol=1e-5, atol=2e-6
    )
    np.testing.assert_allclose(in_tckd + rest * in_nckd, gradient, rtol=1e-4, atol=1e-6)
