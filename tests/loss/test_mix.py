"""A distillation objective mixed with cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.loss import CTKD, TAID, CrossEntropy, ForwardKL, Mix
from taid_jax.loss._reduce import token_metrics


def test_mix_is_the_weighted_sum_of_its_two_losses(make_inputs, evaluate):
    inputs, inner = make_inputs(), TAID(0.3)
    arguments = (inputs.student, inputs.teacher, inputs.labels)
    distil, lm = evaluate(inner, *arguments), evaluate(CrossEntropy(), *arguments)
    for one, other, mixed in zip(
        lm, distil, evaluate(Mix(inner, 0.75), *arguments), strict=True
    ):
        # One rounding more.
        np.testing.assert_allclose(
            mixed, 0.25 * one + 0.75 * other, rtol=1e-5, atol=1e-7
        )


def test_mix_at_either_end_is_one_loss_alone(make_inputs, evaluate):
    inputs = make_inputs()
    arguments = (inputs.student, inputs.teacher, inputs.labels)
    broken = (inputs.student, np.full_like(inputs.teacher, np.nan), inputs.labels)
    for ratio, alone, given in (
        (0, CrossEntropy(), broken),
        (1.0, TAID(0.3), arguments),
    ):
        expected = evaluate(alone, *arguments)
        for one, other in zip(
            evaluate(Mix(TAID(0.3), ratio), *given), expected, strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_mix_names_both_losses_and_the_inner_metrics(make_inputs, evaluate):
    inputs = make_inputs()
    arguments = [jnp.asarray(x) for x in (inputs.student, inputs.teacher)]
    labels = jnp.asarray(inputs.labels)
    inner = TAID(0.3)
    metrics = jax.jit(token_metrics)(Mix(inner, 0.75), *arguments, labels)
    assert set(metrics) == {
        "kl_teacher",
        "kl_target",
        "distil_loss",
        "lm_loss",
    }
    for name, function in (("distil_loss", inner), ("lm_loss", CrossEntropy())):
        expected, _ = evaluate(function, *arguments, labels)
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-6)
    assert "lm_loss" not in jax.eval_shape(token_metrics, Mix(inner, 1.0), *arguments)


def test_mix_needs_labels_below_one():
    logits = jnp.zeros((2, 5, 33))
    with pytest.raises(ValueError, match=r"Mix needs labels .*\(2, 5\)"):
        Mix(ForwardKL(), 0.5)(logits, logits)
    assert jax.eval_shape(Mix(ForwardKL(), 1), logits, logits).shape == (2, 5)


def test_mix_keeps_the_leaves_of_its_objective(make_inputs):
    """CTKD's temperature learns through it."""
    inputs = make_inputs((2, 9))
    arguments = [
        jnp.asarray(x) for x in (inputs.student, inputs.teacher, inputs.labels)
    ]
    slope = jax.jit(jax.grad(lambda each: jnp.sum(each(*arguments))))
    whole = slope(CTKD(4.0, 1.0)).temperature
    half = slope(Mix(CTKD(4.0, 1.0), 0.5)).objective.temperature
    np.testing.assert_allclose(half, 0.5 * whole, rtol=1e-6)
