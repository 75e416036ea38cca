"""TAID and AMiD: their exact gradients, and what both keep at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from taid_jax.loss import TAID, AlphaMixture, ForwardKL, distillation_loss, taid_loss

pytestmark = pytest.mark.optimised

SHAPES = (1, -3.0, -1.0, 0.99, 1 - 1e-6, 3.0)
"""Of the mixture; 1 is TAID."""


def make(t, shape):
    t = jnp.float32(t)
    return TAID(t) if shape == 1 else AlphaMixture(t, shape)


def exactly(oracle, inputs, t, shape):
    t = float(np.float32(t))
    both = inputs.student, inputs.teacher
    if shape == 1:
        return oracle("taid", *both, t=t)
    return oracle("alpha_mixture", *both, t=t, shape=shape)


def relative_error(gradient: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each token's gradient, by its own norm."""
    error = np.linalg.norm(gradient - expected, axis=-1)
    return error / np.linalg.norm(expected, axis=-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_exact_to_float32(make_inputs, evaluate, oracle, shape):
    """Every token by its own norm, also where that is 1e-20; of every scale.

    Teachers are independent of the student, or the student plus so much noise.
    """
    for scale in (1.0, 3.0, 10.0, 30.0):
        for noise in (None, 1.0, 0.1, 1e-2, 1e-3):
            inputs = make_inputs((2, 5, 33), scale, noise)
            for t in (1e-3, 1e-2, 0.1, 0.4, 1.0):
                losses, gradient = evaluate(
                    make(t, shape), inputs.student, inputs.teacher
                )
                expected, exact = exactly(oracle, inputs, t, shape)
                # The promise of the design, for the worst token of the batch.
                error = relative_error(gradient, exact).max()
                assert error < 1e-5, (scale, noise, t)
                np.testing.assert_allclose(losses, expected, rtol=3e-6, atol=3e-7)


def test_taid_gradient_survives_a_shift_of_the_teacher(make_inputs, evaluate, oracle):
    """A constant over the vocabulary changes no softmax and must cost no digits."""
    inputs = make_inputs(scale=1.0, noise=1e-3)
    inputs.teacher[...] += np.float32(7.3)
    _, gradient = evaluate(make(0.4, 1), inputs.student, inputs.teacher)
    _, exact = exactly(oracle, inputs, 0.4, 1)
    assert relative_error(gradient, exact).max() < 1e-5


def test_alpha_mixture_of_shape_one_is_taid_bit_for_bit(make_inputs, evaluate):
    for noise in (None, 1e-3):
        inputs = make_inputs(noise=noise)
        for t in map(jnp.float32, (0.0, 1e-3, 0.4, 1.0)):
            found, expected = (
                evaluate(each, inputs.student, inputs.teacher)
                for each in (AlphaMixture(t, 1), TAID(t))
            )
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_ends_are_student_and_teacher(make_inputs, evaluate, shape):
    inputs = make_inputs()
    student, teacher = inputs.student, inputs.teacher
    teacher[0, 0, 4] = teacher[0, 1, student[0, 1].argmax()] = -np.inf
    losses, gradient = evaluate(make(0, shape), student, teacher)
    assert not gradient.any()
    entropy, _ = evaluate(ForwardKL(), student, student)
    np.testing.assert_allclose(losses, entropy, rtol=1e-6)
    found = evaluate(make(1, shape), student, teacher)
    for one, other in zip(found, evaluate(ForwardKL(), student, teacher), strict=True):
        rtol, atol = (1e-5, 1e-8) if shape == 1 else (2e-5, 1e-7)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", [1, -3.0, 3.0])
def test_metrics_give_kl_to_the_target(make_inputs, oracle, shape):
    run = jax.jit(lambda objective, *rows: objective.metrics(*rows)["kl_target"])
    for scale in (1.0, 12.0, 30.0):
        inputs = make_inputs(scale=scale)
        q, p = inputs.student.astype(float), inputs.teacher.astype(float)
        log_q, log_p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (q, p))
        for t in (0.0, 1e-3, 0.4, 1.0):
            power, t = (1 - shape) / 2, float(np.float32(t))
            with np.errstate(divide="ignore"):
                log_r = (
                    np.logaddexp(
                        power * log_p + np.log(t), power * log_q + np.log1p(-t)
                    )
                    / power
                    if power
                    else t * log_p + (1 - t) * log_q
                )
            log_r -= np.log(np.exp(log_r).sum(-1, keepdims=True))
            expected = (np.exp(log_r) * (log_r - log_q)).sum(-1)
            found = run(make(t, shape), inputs.student, inputs.teacher)
            # Of terms that reach 150 nats.
            atol = 1e-6 if shape == 1 else 2e-6
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol)
            assert shape != 1 or t or not found.any()


@pytest.mark.parametrize("shape", [1, -1.0, 3.0])
def test_entries_of_minus_infinity_are_left_out(make_inputs, evaluate, oracle, shape):
    inputs = make_inputs()
    student, teacher = (x.reshape(10, 33) for x in (inputs.student, inputs.teacher))
    student[0, 3] = student[1, :20] = -np.inf
    teacher[0, 4] = teacher[2, :20] = -np.inf
    student[3, 5:9] = teacher[3, 5:9] = -np.inf
    # The student's likeliest entry, and all but one entry.
    teacher[4, student[4].argmax()] = -np.inf
    student[5, 1:] = -np.inf
    for t in (0.0, 1e-3, 0.5, 1.0):
        found = evaluate(make(t, shape), inputs.student, inputs.teacher)
        losses, exact = exactly(oracle, inputs, t, shape)
        # AMiD's mixture is a sum of powers; TAID's a product.
        rtol, atol = (1e-6, 1e-7) if shape == 1 else (2e-6, 1e-6)
        np.testing.assert_allclose(found[0], losses, rtol=rtol, atol=atol)
        rtol, atol = (1e-5, 1e-8) if shape == 1 else (1e-4, 1e-7)
        np.testing.assert_allclose(found[1], exact, rtol=rtol, atol=atol)


def test_taid_of_enormous_differences_is_finite(evaluate):
    for size in (50.0, 300.0, 1e4, 1e6, 1e9, 1e20):
        student = np.float32([[0.0, size, -size, 1.0], [1.0, 2.0, 3.0, 4.0]])
        teacher = np.float32([[size, -size, 0.0, 2.0], [-size, 0.0, size, 5.0]])
        for t in (0.0, 1e-3, 0.5, 1.0):
            losses, gradient = evaluate(make(t, 1), student, teacher)
            assert np.isfinite(losses).all()
            # q - p: entries of a difference of two distributions.
            assert abs(gradient).max() <= 1
            np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


@pytest.mark.parametrize("shape", [1, -1.0, 3.0])
def test_curvature_is_finite_at_both_ends(shape):
    """What a branch does that is not taken reaches the second derivative."""
    student = jnp.array([[0.0, 400.0, -400.0], [1.0, 2.0, 3.0]])
    teacher = jnp.array([[0.0, -400.0, 400.0], [3.0, 2.0, -jnp.inf]])

    @jax.jit
    def curvature(t):
        def gradient(s):
            return jax.grad(lambda s: jnp.sum(make(t, shape)(s, teacher)))(s)

        return jax.grad(lambda s: jnp.sum(gradient(s) ** 2))(student)

    for t in (0.0, 0.5, 1.0):
        assert np.isfinite(curvature(jnp.float32(t))).all()


def test_taid_under_vmap_over_t_is_one_t_at_a_time(make_inputs, evaluate):
    inputs = make_inputs()
    student, teacher = jnp.asarray(inputs.student), jnp.asarray(inputs.teacher)
    t = jnp.array([0.0, 0.3, 1.0])

    def gradient(t):
        return jax.grad(lambda s: jnp.sum(TAID(t)(s, teacher)))(student)

    together = jax.jit(jax.vmap(gradient))(t)
    for i in range(3):
        _, single = evaluate(TAID(t[i]), student, teacher)
        # The same formulas, in loops of other shapes.
        np.testing.assert_allclose(together[i], single, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_objectives_of_half_precision_are_computed_in_float32(
    make_inputs, evaluate, dtype
):
    inputs = make_inputs()
    student, teacher = (jnp.asarray(x, dtype) for x in (inputs.student, inputs.teacher))
    losses, gradient = evaluate(TAID(0.4), student, teacher)
    assert losses.dtype == np.float32
    assert gradient.dtype == dtype
    wide = (x.astype(jnp.float32) for x in (student, teacher))
    expected = evaluate(TAID(0.4), *wide)
    np.testing.assert_array_equal(losses, expected[0])
    # One rounding of the finished gradient: 8 bits, or float16's least number.
    np.testing.assert_allclose(
        gradient.astype(np.float32), expected[1], rtol=2**-8, atol=6e-8
    )


@pytest.mark.multidevice
@pytest.mark.parametrize("kind", ["taid", "dkd"], indirect=True)
def test_objectives_take_a_sharded_vocabulary(kind, make_inputs, evaluate):
    inputs = make_inputs((2, 5, 32))

    @jax.jit
    def run(objective, student, teacher, labels):
        def loss(student):
            return jnp.sum(objective(student, teacher, labels))

        return jax.value_and_grad(loss)(student)

    for axis_type in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(axis_type,) * 2)
        logits = NamedSharding(mesh, P("data", None, "tensor"))
        labels = jax.device_put(inputs.labels, NamedSharding(mesh, P("data", None)))
        with jax.set_mesh(mesh):
            both = jax.device_put((inputs.student, inputs.teacher), logits)
            lowered = run.lower(kind.objective, *both, labels)
            if axis_type == AxisType.Explicit and kind.name != "taid":
                continue  # What the types of the axes forbid is seen before this.
            loss, gradient = lowered.compile()(kind.objective, *both, labels)
        expected = evaluate(
            kind.objective, inputs.student, inputs.teacher, inputs.labels
        )
        # Sums over four devices, in another order.
        np.testing.assert_allclose(loss, expected[0].sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-7)


def test_taid_loss_is_the_mean_of_taid(make_inputs):
    inputs = make_inputs()
    mask = jnp.array([[1, 1, 0, 1, 0], [0, 1, 1, 0, 1]])
    args = (jnp.asarray(inputs.student), jnp.asarray(inputs.teacher), mask)

    @jax.jit
    def both(t):
        return taid_loss(*args, t=t), distillation_loss(TAID(t), *args)

    one, other = both(0.3)
    assert one == other
    assert jax.eval_shape(lambda: taid_loss(*args[:2], t=0)).shape == ()
    with pytest.raises(ValueError, match=r"t = 1.5"):
        taid_loss(*args, t=1.5)


LOGITS = st.one_of(
    st.floats(-40, 40, width=32),
    st.sampled_from([-np.inf, 0.0, 1e4, -1e4, 3e-39]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), t=st.sampled_from([0.0, 1e-3, 0.3, 1.0]))
def test_taid_of_odd_logits_is_finite_and_balanced(evaluate, data, t):
    row = st.lists(LOGITS, min_size=4, max_size=4)
    # As many rows as other tests have: one program.
    student, teacher = (np.float32([data.draw(row)] * 2) for _ in range(2))
    losses, gradient = evaluate(TAID(t), student, teacher)
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()
    assert not gradient[np.isneginf(student)].any()
    # q - p sums to 0, or to what q has where p is nowhere.
    total = gradient[0].sum()
    assert abs(total) < 1e-5 or abs(total - 1) < 1e-5
