"""TAID's sums by the kernel for GPUs, run without one, beside the oracle."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.loss import TAID
from taid_jax.loss import _one_pass as kernel
from taid_jax.loss._reduce import token_metrics

pytestmark = pytest.mark.optimised

VOCAB = 257
"""With the lanes and entries below, eight steps and one entry."""


@pytest.fixture(scope="module")
def evaluate():
    """Losses, metrics and gradients by the kernel, with several steps of few lanes.

    All tests give it eight tokens: it is one program.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(kernel, "_LANES", 16)
    patch.setattr(kernel, "_ENTRIES", 2)

    @jax.jit
    def run(objective, student, teacher):
        def total(student):
            with kernel.one_pass(True, interpret=True):
                losses = objective(student, teacher)
                metrics = token_metrics(objective, student, teacher)
            return jnp.sum(losses), (losses, metrics)

        gradient, (losses, metrics) = jax.grad(total, has_aux=True)(student)
        return losses, gradient, metrics

    def evaluate(t, student, teacher):
        rows = jnp.asarray(student), jnp.asarray(teacher)
        return jax.tree.map(np.asarray, run(TAID(jnp.float32(t)), *rows))

    yield evaluate
    patch.undo()


def test_one_pass_leaves_no_other_sum_over_the_rows(make_inputs):
    inputs = make_inputs((3, VOCAB))
    teacher = jnp.asarray(inputs.teacher)

    def both(wanted):
        def total(student):
            with kernel.one_pass(wanted):
                losses = TAID(0.4)(student, teacher)
                metrics = token_metrics(TAID(0.4), student, teacher)
            return jnp.sum(losses), metrics

        return jax.value_and_grad(total, has_aux=True)

    one, plain = (
        str(jax.make_jaxpr(both(wanted))(jnp.asarray(inputs.student)))
        for wanted in (True, False)
    )
    over_rows = re.compile(r"reduce_(?:max|sum)\[\s*axes=\(1,\)")
    assert "pallas_call" in one
    assert not over_rows.search(one)
    assert over_rows.search(plain)
    assert "pallas_call" not in plain


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("noise", [None, 0.1, 1e-3])
def test_one_pass_is_exact_to_float32(make_inputs, evaluate, oracle, scale, noise):
    """As the plain form, every token by its own norm; a shift costs no digits."""
    inputs = make_inputs((8, VOCAB), scale, noise)
    teacher = inputs.teacher + np.float32([[0], [7.3], [0], [-50]] * 2)
    for t in (1e-3, 0.4, 1.0):
        t32 = float(np.float32(t))
        losses, gradient, metrics = evaluate(t, inputs.student, teacher)
        expected, exact = oracle("taid", inputs.student, teacher, t=t32)
        error = np.linalg.norm(gradient - exact, axis=-1)
        assert (error < 1e-5 * np.linalg.norm(exact, axis=-1)).all()
        np.testing.assert_allclose(losses, expected, rtol=3e-6, atol=3e-7)
        student, other = (x.astype(float) for x in (inputs.student, teacher))
        for name, mixed in (
            ("kl_teacher", other),
            ("kl_target", (1 - t32) * student + t32 * other),
        ):
            cross, _ = oracle("forward_kl", student, mixed)
            entropy, _ = oracle("forward_kl", mixed, mixed)
            np.testing.assert_allclose(
                metrics[name], cross - entropy, rtol=1e-5, atol=2e-6, err_msg=name
            )


def test_one_pass_leaves_out_entries_of_minus_infinity(make_inputs, evaluate, oracle):
    inputs = make_inputs((8, VOCAB))
    student, teacher = inputs.student, inputs.teacher
    student[0, 3] = student[1, :200] = -np.inf
    teacher[0, 4] = teacher[2, :200] = -np.inf
    student[3, 5:90] = teacher[3, 5:90] = -np.inf
    # The student's likeliest entry, and all but one.
    teacher[4, student[4].argmax()] = -np.inf
    student[5, 1:] = -np.inf
    # Nothing is left in common: there is no oracle at t = 1.
    student[6, 100:] = teacher[6, :100] = -np.inf
    plain_form = jax.jit(
        lambda objective, *rows: (
            objective(*rows),
            token_metrics(objective, *rows),
        )
    )
    for t in (0.0, 1e-3, 0.5, 1.0):
        losses, gradient, metrics = evaluate(t, student, teacher)
        t32 = float(np.float32(t))
        expected, exact = oracle("taid", student[:6], teacher[:6], t=t32)
        np.testing.assert_allclose(losses[:6], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(gradient[:6], exact, rtol=1e-5, atol=1e-8)
        rows = jnp.asarray(student), jnp.asarray(teacher)
        objective = TAID(jnp.float32(t))
        expected, plain = plain_form(objective, *rows)
        np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(gradient[6].sum(), float(t == 1), atol=1e-5)
        for name in plain:
            np.testing.assert_allclose(
                metrics[name][:6], plain[name][:6], rtol=1e-5, atol=2e-6, err_msg=name
            )


def test_one_pass_of_enormous_differences_is_finite(evaluate):
    student, teacher = np.float32(np.zeros((2, 8, VOCAB)))
    for row, size in enumerate((50.0, 1e4, 1e20)):
        student[row, [1, 100, 256]] = size, -size, 1
        teacher[row, [0, 1, 256]] = size, -size, 2
    for t in (0.0, 1e-3, 0.5, 1.0):
        losses, gradient, metrics = evaluate(t, student, teacher)
        for values in (losses, gradient, *metrics.values()):
            assert np.isfinite(values).all()
        assert abs(gradient).max() <= 1
        np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-5)


def test_one_pass_of_no_distribution_is_nan(make_inputs, evaluate):
    inputs = make_inputs((8, VOCAB))
    rows = inputs.student, inputs.teacher
    for i, value in enumerate((np.nan, np.inf, 1e38)):
        rows[0][i, 60] = rows[1][4 + i, 60] = value
    rows[0][3] = rows[1][7] = -np.inf
    losses, gradient, metrics = evaluate(0.4, *rows)
    for values in (losses, gradient, *metrics.values()):
        assert np.isnan(values).all()


def test_one_pass_has_the_curvature_of_the_plain_form(make_inputs, evaluate):
    inputs = make_inputs((2, 33))
    student, teacher = jnp.asarray(inputs.student), jnp.asarray(inputs.teacher)

    def curvature(student, wanted):
        def gradient(student):
            with kernel.one_pass(wanted, interpret=True):
                return jax.grad(lambda s: jnp.sum(TAID(0.4)(s, teacher)))(student)

        return jax.grad(lambda s: jnp.sum(gradient(s) ** 2))(student)

    one, plain = (
        jax.jit(curvature, static_argnums=1)(student, x) for x in (True, False)
    )
    np.testing.assert_allclose(one, plain, rtol=1e-4, atol=1e-7)


def test_one_pass_under_vmap_over_t_is_one_t_at_a_time(make_inputs, evaluate):
    inputs = make_inputs((8, VOCAB))
    rows = jnp.asarray(inputs.student), jnp.asarray(inputs.teacher)
    t = jnp.array([0.0, 0.3, 1.0])

    def gradient(t):
        with kernel.one_pass(True, interpret=True):
            return kernel.taid_gradient(*rows, t)

    together = jax.jit(jax.vmap(gradient))(t)
    assert not together[0].any()
    for one, number in zip(together[1:], t[1:], strict=True):
        single = evaluate(number, inputs.student, inputs.teacher)[1]
        # Another program's rounding; every token by its own norm.
        error = np.linalg.norm(one - single, axis=-1)
        assert (error < 1e-5 * np.linalg.norm(single, axis=-1)).all()
