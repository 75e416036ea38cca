"""The objectives that came after TAID: what each promises alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.loss import (
    TAID,
    AlphaBeta,
    AlphaMixture,
    ConcreteScore,
    EntropyGated,
    ForwardKL,
    ReverseKL,
)

pytestmark = pytest.mark.optimised

SHAPES = (-3.0, -1.0, 0.0, 0.99, 3.0)
ROWS = [(1.0, None), (1.0, 1e-3), (3.0, 1.0), (10.0, 1e-2), (30.0, None), (30.0, 1e-3)]
"""Scales, and teachers: independent, or the student plus so much noise."""


def token_errors(gradient, expected):
    error = np.linalg.norm(gradient - expected, axis=-1)
    return error / np.linalg.norm(expected, axis=-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_alpha_mixture_gradient_is_exact_to_float32(
    make_inputs, evaluate, oracle, shape
):
    """Every token by its own norm, near t = 0 as anywhere."""
    for scale, noise in ROWS:
        inputs = make_inputs((8, 257), scale, noise)
        for t in map(np.float32, (1e-3, 0.1, 0.4, 1.0)):
            objective = AlphaMixture(jnp.asarray(t), shape)
            losses, gradient = evaluate(objective, inputs.student, inputs.teacher)
            expected, exact = oracle(
                "alpha_mixture",
                inputs.student,
                inputs.teacher,
                t=float(t),
                shape=shape,
            )
            # As of TAID.
            assert token_errors(gradient, exact).max() < 1e-5, (scale, noise, t)
            np.testing.assert_allclose(losses, expected, rtol=3e-6, atol=3e-7)


def test_alpha_mixture_of_shape_one_is_taid_bit_for_bit(make_inputs, evaluate):
    for noise in (None, 1e-3):
        inputs = make_inputs(noise=noise)
        for t in map(jnp.float32, (0.0, 1e-3, 0.4, 1.0)):
            both = AlphaMixture(t, 1), TAID(t)
            found, expected = (
                evaluate(each, inputs.student, inputs.teacher) for each in both
            )
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])
            found, expected = (
                jax.jit(type(each).metrics)(each, inputs.student, inputs.teacher)
                for each in both
            )
            np.testing.assert_array_equal(found["kl_target"], expected["kl_target"])


@pytest.mark.parametrize("shape", [1 - 1e-3, 1 + 1e-3, 1 - 1e-6])
def test_alpha_mixture_tends_to_taid_as_its_shape_to_one(make_inputs, evaluate, shape):
    inputs = make_inputs(scale=1.0)
    found, expected = (
        evaluate(each, inputs.student, inputs.teacher)
        for each in (AlphaMixture(0.4, shape), TAID(0.4))
    )
    # The curve bends by t (1 - t) / 2 of x^2 times the power.
    size = abs(1 - shape) * 10 + 1e-6
    np.testing.assert_allclose(found[0], expected[0], atol=size)
    np.testing.assert_allclose(found[1], expected[1], atol=size)


@pytest.mark.parametrize("shape", SHAPES)
def test_alpha_mixture_ends_are_student_and_teacher(make_inputs, evaluate, shape):
    inputs = make_inputs()
    student, teacher = inputs.student, inputs.teacher
    teacher[0, 0, 4] = teacher[0, 1, student[0, 1].argmax()] = -np.inf
    at_zero = AlphaMixture(jnp.float32(0), shape)
    losses, gradient = evaluate(at_zero, student, teacher)
    assert not gradient.any()
    entropy, _ = evaluate(ForwardKL(), student, student)
    np.testing.assert_allclose(losses, entropy, rtol=1e-6)
    metrics = jax.jit(AlphaMixture.metrics)(at_zero, student, teacher)
    np.testing.assert_allclose(metrics["kl_target"], 0, atol=5e-7)
    found = evaluate(AlphaMixture(jnp.float32(1), shape), student, teacher)
    for one, other in zip(found, evaluate(ForwardKL(), student, teacher), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [-3.0, 0.0, 3.0])
def test_alpha_mixture_metrics_give_kl_to_the_target(make_inputs, shape):
    power = (1 - shape) / 2
    for scale in (1.0, 12.0, 30.0):
        inputs = make_inputs((6, 33), scale)
        log_q, log_p = (
            x - np.log(np.exp(x).sum(-1, keepdims=True))
            for x in (inputs.student.astype(float), inputs.teacher.astype(float))
        )
        for t in (1e-3, 0.4, 1.0):
            with np.errstate(divide="ignore"):
                parts = power * log_p + np.log(t), power * log_q + np.log(1 - t)
            log_r = np.logaddexp(*parts) / power
            log_r -= np.log(np.exp(log_r).sum(-1, keepdims=True))
            expected = (np.exp(log_r) * (log_r - log_q)).sum(-1)
            objective = AlphaMixture(jnp.float32(t), shape)
            metrics = jax.jit(AlphaMixture.metrics)(
                objective, inputs.student, inputs.teacher
            )
            # Of terms that reach 150 nats.
            np.testing.assert_allclose(
                metrics["kl_target"], expected, rtol=1e-5, atol=2e-6
            )


@pytest.mark.parametrize("shape", [-1.0, 3.0])
def test_alpha_mixture_leaves_out_entries_of_minus_infinity(
    make_inputs, evaluate, oracle, shape
):
    inputs = make_inputs()
    student, teacher = (x.reshape(10, 33) for x in (inputs.student, inputs.teacher))
    student[0, 3] = student[1, :20] = -np.inf
    teacher[0, 4] = teacher[2, :20] = -np.inf
    student[3, 5:9] = teacher[3, 5:9] = -np.inf
    # The student's likeliest entry, and all but one entry.
    teacher[4, student[4].argmax()] = -np.inf
    student[5, 1:] = -np.inf
    for t in (0.0, 1e-3, 0.5, 1.0):
        both = inputs.student, inputs.teacher
        losses, gradient = evaluate(AlphaMixture(jnp.float32(t), shape), *both)
        settings = {"t": float(np.float32(t)), "shape": shape}
        expected, exact = oracle("alpha_mixture", *both, **settings)
        np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [-1.0, 3.0])
def test_alpha_mixture_curvature_is_finite_at_its_ends(shape):
    student = jnp.array([[0.0, 400.0, -400.0], [1.0, 2.0, 3.0]])
    teacher = jnp.array([[0.0, -400.0, 400.0], [3.0, 2.0, -jnp.inf]])

    @jax.jit
    def curvature(t):
        def gradient(s):
            return jax.grad(lambda s: jnp.sum(AlphaMixture(t, shape)(s, teacher)))(s)

        return jax.grad(lambda s: jnp.sum(gradient(s) ** 2))(student)

    for t in (0.0, 0.5, 1.0):
        assert np.isfinite(curvature(jnp.float32(t))).all()


def test_alpha_mixture_does_not_compile_again_for_another_t(make_inputs):
    inputs = make_inputs()
    traces = []

    @jax.jit
    def loss(objective):
        traces.append(1)
        return jnp.sum(
            objective(jnp.asarray(inputs.student), jnp.asarray(inputs.teacher))
        )

    assert len({float(loss(AlphaMixture(t, 0))) for t in (0.1, 0.2, 0.9)}) == 3
    assert len(traces) == 1


@pytest.mark.parametrize("small", [0, 1e-6, 1e-3])
def test_alpha_beta_tends_to_both_kls(make_inputs, evaluate, small):
    inputs = make_inputs(scale=1.0)
    student, teacher = inputs.student, inputs.teacher
    # With the teacher's entropy, which has no gradient.
    entropy, _ = evaluate(ForwardKL(), teacher, teacher)
    cross, in_forward = evaluate(ForwardKL(), student, teacher)
    expected, in_reverse = evaluate(ReverseKL(), student, teacher)
    # The next terms of both are of the size of the square of x.
    size = 20 * small + 2e-6
    found, gradient = evaluate(AlphaBeta(1, small), student, teacher)
    np.testing.assert_allclose(found, cross - entropy, atol=size)
    np.testing.assert_allclose(gradient, in_forward, atol=size)
    found, gradient = evaluate(AlphaBeta(small, 1), student, teacher)
    np.testing.assert_allclose(found, expected, atol=size)
    np.testing.assert_allclose(gradient, in_reverse, atol=size)


@pytest.mark.parametrize("powers", [(0.2, 0.7), (1, 0), (0, 1), (0.5, 1.5), (1e-4, 1)])
def test_alpha_beta_gradient_is_exact_to_float32(make_inputs, evaluate, oracle, powers):
    """Every token by its own norm, a certain student's and a near teacher's too."""
    a, b = powers
    for scale, noise in ROWS:
        inputs = make_inputs((8, 257), scale, noise)
        _, gradient = evaluate(AlphaBeta(a, b), inputs.student, inputs.teacher)
        _, exact = oracle("alpha_beta", inputs.student, inputs.teacher, a=a, b=b)
        # At scale 30 a logarithm of a probability reaches 150: 150 * 2^-24.
        limit = 1e-5 if scale < 30 else 5e-5
        assert token_errors(gradient, exact).max() < limit, (scale, noise)


def test_concrete_score_is_the_sum_over_pairs(make_inputs, evaluate):
    inputs = make_inputs((3, 7), 1.0)
    s, u = inputs.student.astype(float), inputs.teacher.astype(float)
    pairs = (s - u)[:, :, None] - (s - u)[:, None, :]
    for weights, logits in (("student", s), ("teacher", u)):
        w = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected = (w[:, :, None] * w[:, None, :] * pairs**2).sum((1, 2))
        objective = ConcreteScore(weights)
        losses, gradient = evaluate(objective, inputs.student, inputs.teacher)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        slope = 4 * w * (w[:, None, :] * pairs).sum(-1)
        np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)
        # A shift that float32 adds exactly to each logit's difference.
        moved, _ = evaluate(objective, inputs.student, inputs.teacher + np.float32(64))
        np.testing.assert_allclose(moved, losses, rtol=1e-4)


def test_concrete_score_by_the_student_has_the_gradient_of_reverse_kl(
    make_inputs, evaluate
):
    for scale in (1.0, 12.0):
        inputs = make_inputs((8, 257), scale)
        _, found = evaluate(ConcreteScore(), inputs.student, inputs.teacher)
        _, expected = evaluate(ReverseKL(), inputs.student, inputs.teacher)
        assert token_errors(found, 4 * expected).max() < 2e-6


def test_entropy_gated_adds_forward_kl_where_the_teacher_is_unsure(
    make_inputs, evaluate
):
    inputs = make_inputs((6, 33), 2.0)
    student, teacher = inputs.student, inputs.teacher
    entropy, _ = evaluate(ForwardKL(), teacher, teacher)
    threshold = float(np.sort(entropy)[2:4].mean())
    cross, in_forward = evaluate(ForwardKL(), student, teacher)
    reverse, in_reverse = evaluate(ReverseKL(), student, teacher)
    losses, gradient = evaluate(EntropyGated(threshold), student, teacher)
    unsure = entropy > threshold
    assert unsure.sum() == 3
    np.testing.assert_allclose(losses, reverse + unsure * (cross - entropy), rtol=1e-5)
    expected = in_reverse + unsure[:, None] * in_forward
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


def test_entropy_gated_measures_entropy_at_its_temperature(make_inputs, evaluate):
    inputs = make_inputs((6, 33), 2.0)
    warm, _ = evaluate(ForwardKL(), inputs.teacher / 3, inputs.teacher / 3)
    threshold = float(warm.min()) - 0.01
    cold, _ = evaluate(ForwardKL(), inputs.teacher, inputs.teacher)
    assert (cold < threshold).all()
    gated, never = (
        evaluate(EntropyGated(each, 3.0), inputs.student, inputs.teacher)[0]
        for each in (threshold, 100)
    )
    assert (gated > never + 0.1).all()
