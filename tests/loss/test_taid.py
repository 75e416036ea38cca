"""TAID: values, its exact gradient, and what it keeps at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from taid_jax.loss import TAID, ForwardKL, distillation_loss, taid_loss

pytestmark = pytest.mark.optimised

T_VALUES = (1e-3, 1e-2, 0.1, 0.4, 0.75, 1.0)
SCALES = (1.0, 3.0, 10.0, 30.0)
NOISES = (None, 1.0, 0.1, 1e-2, 1e-3)
"""Teachers: independent of the student, or the student plus so much noise."""


def relative_error(gradient: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each token's gradient, by its own norm."""
    error = np.linalg.norm(gradient - expected, axis=-1)
    return error / np.linalg.norm(expected, axis=-1)


def test_taid_of_two_entries_is_what_the_definition_says(evaluate):
    student, teacher = np.float32([[0.0, 1.0]]), np.float32([[3.0, 0.0]])
    t = 0.25
    mixed = np.array([0.75 * 0 + 0.25 * 3, 0.75 * 1 + 0.25 * 0])
    p = np.exp(mixed) / np.exp(mixed).sum()
    q = np.exp([0, 1]) / np.exp([0, 1]).sum()
    losses, gradient = evaluate(TAID(t), student, teacher)
    np.testing.assert_allclose(losses[0], -(p * np.log(q)).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient[0], q - p, rtol=1e-6)


def test_taid_of_bfloat16_follows_float32_not_the_recorded_rounding(
    recorded, golden_losses, mean_loss, oracle
):
    """The published mixture is rounded to bfloat16; ours is float32 from the input."""
    inputs = recorded("bf16")
    mask = golden_losses["bf16/mask"]
    loss, gradient = mean_loss(TAID(0.25), recorded("bf16", jnp.bfloat16), mask)
    values, gradients = oracle("taid", inputs.student, inputs.teacher, t=0.25)
    np.testing.assert_allclose(loss, values[mask == 1].mean(), rtol=1e-6)
    expected = gradients * mask[..., None] / mask.sum()
    assert gradient.dtype == jnp.bfloat16
    # One rounding to bfloat16's 8 bits, of the finished gradient.
    np.testing.assert_allclose(
        gradient.astype(np.float32), expected, rtol=2**-8, atol=1e-9
    )
    recorded = golden_losses["bf16/taid_0.25/grad"]
    published = np.linalg.norm(recorded - expected) / np.linalg.norm(expected)
    ours = np.linalg.norm(gradient.astype(np.float32) - expected)
    assert ours / np.linalg.norm(expected) < published / 4


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("noise", NOISES)
def test_taid_gradient_is_exact_to_float32(make_inputs, evaluate, oracle, scale, noise):
    """Every token by its own norm, also where that is 1e-20."""
    for seed in range(2):
        inputs = make_inputs((8, 257), scale, noise, seed)
        for t in T_VALUES:
            t32 = np.float32(t)
            losses, gradient = evaluate(
                TAID(jnp.asarray(t32)), inputs.student, inputs.teacher
            )
            expected, exact = oracle(
                "taid", inputs.student, inputs.teacher, t=float(t32)
            )
            # The promise of the design, for the batch and for the worst token in it.
            assert relative_error(gradient, exact).max() < 1e-5
            np.testing.assert_allclose(losses, expected, rtol=3e-6, atol=3e-7)


def test_taid_gradient_survives_a_shift_of_the_teacher(make_inputs, evaluate, oracle):
    """A constant over the vocabulary changes no softmax and must cost no digits."""
    inputs = make_inputs((8, 257), 1.0, 1e-3)
    teacher = inputs.teacher + np.float32(7.3)
    _, gradient = evaluate(TAID(jnp.float32(0.4)), inputs.student, teacher)
    _, exact = oracle("taid", inputs.student, teacher, t=float(np.float32(0.4)))
    assert relative_error(gradient, exact).max() < 1e-5


def test_subtracting_softmaxes_would_not_be_exact(make_inputs, oracle):
    """What the exact gradient is for: the plain form fails the same test."""
    inputs = make_inputs((8, 257), 3.0, 1e-3)

    def plain(student):
        mixed = 0.999 * jax.lax.stop_gradient(student) + 1e-3 * inputs.teacher
        return -jnp.sum(jax.nn.softmax(mixed) * jax.nn.log_softmax(student))

    gradient = jax.jit(jax.grad(plain))(jnp.asarray(inputs.student))
    _, exact = oracle("taid", inputs.student, inputs.teacher, t=1e-3)
    assert relative_error(np.asarray(gradient), exact).min() > 1e-2


@pytest.mark.parametrize("size", [50.0, 300.0, 1e4, 1e6, 1e9, 1e20])
def test_taid_of_enormous_differences_is_finite(evaluate, size):
    student = np.array([[0.0, size, -size, 1.0], [1.0, 2.0, 3.0, 4.0]], np.float32)
    teacher = np.array([[size, -size, 0.0, 2.0], [-size, 0.0, size, 5.0]], np.float32)
    for t in (0.0, 1e-3, 0.5, 1.0):
        losses, gradient = evaluate(TAID(jnp.float32(t)), student, teacher)
        assert np.isfinite(losses).all()
        assert np.isfinite(gradient).all()
        # q - p: entries of a difference of two distributions.
        assert abs(gradient).max() <= 1
        np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


def test_taid_leaves_out_entries_of_minus_infinity(make_inputs, evaluate, oracle):
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
        losses, gradient = evaluate(TAID(jnp.float32(t)), *both)
        expected, exact = oracle("taid", *both, t=float(np.float32(t)))
        np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-8)


def test_taid_curvature_is_finite_where_the_rows_have_nothing_in_common():
    """What a branch does that is not taken reaches the second derivative."""
    student = jnp.array([[0.0, 400.0, -400.0]])
    teacher = jnp.array([[0.0, -400.0, 400.0]])
    gradient = jax.grad(lambda s: jnp.sum(TAID(1.0)(s, teacher)))
    curvature = jax.jit(jax.grad(lambda s: jnp.sum(gradient(s) ** 2)))(student)
    assert np.isfinite(curvature).all()


def test_taid_at_zero_has_no_gradient_and_no_divergence(make_inputs, evaluate):
    inputs = make_inputs()
    losses, gradient = evaluate(TAID(jnp.float32(0)), inputs.student, inputs.teacher)
    assert not gradient.any()
    metrics = jax.jit(TAID.metrics)(TAID(0.0), inputs.student, inputs.teacher)
    np.testing.assert_array_equal(metrics["kl_target"], np.zeros_like(losses))


def test_taid_at_one_is_forward_kl(make_inputs, evaluate):
    inputs = make_inputs()
    taid = evaluate(TAID(jnp.float32(1)), inputs.student, inputs.teacher)
    forward = evaluate(ForwardKL(), inputs.student, inputs.teacher)
    for one, other in zip(taid, forward, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)


def test_taid_metrics_give_kl_to_the_target(make_inputs, oracle):
    inputs = make_inputs()
    for t in (1e-3, 0.4, 1.0):
        metrics = jax.jit(TAID.metrics)(TAID(t), inputs.student, inputs.teacher)
        cross, _ = oracle("taid", inputs.student, inputs.teacher, t=t)
        mixed = (1 - t) * inputs.student.astype(float)
        mixed += t * inputs.teacher.astype(float)
        entropy, _ = oracle("forward_kl", mixed, mixed)
        # The entropy of the target is taken off a cross-entropy of about 3 nats.
        np.testing.assert_allclose(
            metrics["kl_target"], cross - entropy, rtol=1e-5, atol=1e-6
        )


def test_taid_does_not_compile_again_for_another_t(make_inputs):
    inputs = make_inputs()
    traces = []

    @jax.jit
    def loss(objective, student):
        traces.append(1)
        return jnp.sum(objective(student, jnp.asarray(inputs.teacher)))

    values = [loss(TAID(t), jnp.asarray(inputs.student)) for t in (0.1, 0.2, 0.9)]
    assert len(traces) == 1
    assert len(set(map(float, values))) == 3


def test_taid_under_vmap_over_t_is_one_t_at_a_time(make_inputs):
    inputs = make_inputs((4, 33))
    student, teacher = jnp.asarray(inputs.student), jnp.asarray(inputs.teacher)
    t = jnp.array([0.0, 0.3, 1.0])

    def gradient(t):
        return jax.grad(lambda s: jnp.sum(TAID(t)(s, teacher)))(student)

    together = jax.jit(jax.vmap(gradient))(t)
    single = jax.jit(gradient)
    for i in range(3):
        # The same formulas, in loops of other shapes.
        np.testing.assert_allclose(together[i], single(t[i]), rtol=1e-5, atol=1e-8)


def test_objectives_agree_in_every_mode_of_differentiation(kind, make_inputs):
    inputs = make_inputs((3, 17))
    teacher, labels = jnp.asarray(inputs.teacher), jnp.asarray(inputs.labels)
    student = jnp.asarray(inputs.student)
    direction = jnp.cos(jnp.arange(51.0)).reshape(3, 17)
    objective = kind.make()

    def loss(student):
        return jnp.sum(objective(student, teacher, labels))

    @jax.jit
    def modes(student):
        gradient = jax.grad(loss)(student)
        _, forward = jax.jvp(loss, (student,), (direction,))
        saved = jax.grad(jax.checkpoint(loss))(student)
        rows = jax.vmap(lambda s, u, y: jax.grad(lambda s: objective(s, u, y))(s))(
            student, teacher, labels
        )
        _, curvature = jax.jvp(jax.grad(loss), (student,), (direction,))
        return gradient, forward, saved, rows, curvature

    gradient, forward, saved, rows, curvature = modes(student)
    with jax.disable_jit():
        eager = jax.grad(loss)(student)
    # The same formulas, fused in other ways.
    np.testing.assert_allclose(forward, jnp.vdot(gradient, direction), rtol=1e-4)
    for other in (saved, rows, eager):
        np.testing.assert_allclose(other, gradient, rtol=1e-4, atol=1e-6)
    step = 1e-2
    change = modes(student + step * direction)[0]
    change -= modes(student - step * direction)[0]
    # A difference quotient of float32 gradients keeps about three digits.
    np.testing.assert_allclose(
        curvature, change / (2 * step), rtol=2e-2, atol=2e-3 * abs(curvature).max()
    )


@pytest.mark.parametrize(
    "dtype", [pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.bfloat16]
)
def test_objectives_of_half_precision_are_computed_in_float32(
    kind, make_inputs, evaluate, dtype
):
    inputs = make_inputs()
    student, teacher = (jnp.asarray(x, dtype) for x in (inputs.student, inputs.teacher))
    losses, gradient = evaluate(kind.make(), student, teacher, inputs.labels)
    assert losses.dtype == np.float32
    assert gradient.dtype == dtype
    expected = evaluate(
        kind.make(),
        student.astype(jnp.float32),
        teacher.astype(jnp.float32),
        inputs.labels,
    )
    np.testing.assert_array_equal(losses, expected[0])
    # One rounding of the finished gradient: 8 bits, or float16's least number.
    np.testing.assert_allclose(
        gradient.astype(np.float32), expected[1], rtol=2**-8, atol=6e-8
    )


@pytest.mark.multidevice
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
            lowered = run.lower(kind.make(), *both, labels)
            if axis_type == AxisType.Explicit and kind.name != "taid":
                continue  # What the types of the axes forbid is seen before this.
            loss, gradient = lowered.compile()(kind.make(), *both, labels)
        expected = evaluate(kind.make(), inputs.student, inputs.teacher, inputs.labels)
        # Sums over four devices, in another order.
        np.testing.assert_allclose(loss, expected[0].sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-7)


def test_taid_loss_is_the_mean_of_taid(make_inputs):
    inputs = make_inputs()
    mask = jnp.array([[1, 1, 0, 1, 0], [0, 1, 1, 0, 1]])
    args = (jnp.asarray(inputs.student), jnp.asarray(inputs.teacher), mask)
    one, other = (
        jax.jit(f)
        for f in (
            lambda t: taid_loss(*args, t=t),
            lambda t: distillation_loss(TAID(t), *args),
        )
    )
    for t in (0.0, 0.3, 1.0):
        assert one(t) == other(t)
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
    row = st.lists(LOGITS, min_size=5, max_size=5)
    student, teacher = (np.array([data.draw(row)], np.float32) for _ in range(2))
    losses, gradient = evaluate(TAID(jnp.float32(t)), student, teacher)
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()
    assert not gradient[np.isneginf(student)].any()
    # q - p sums to 0, or to what q has where p is nowhere.
    total = gradient.sum()
    assert abs(total) < 1e-5 or abs(total - 1) < 1e-5
