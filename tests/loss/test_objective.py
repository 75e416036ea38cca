"""What an objective refuses before tracing, and what the errors say."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss

WRONG = [
    # t, temperatures and CTKD's strength, as numbers and as arrays that are known.
    ("loss.TAID(1.5)", "0 <= t <= 1, got t = 1.5"),
    ("loss.TAID(2)", "0 <= t <= 1, got t = 2"),
    ("loss.TAID(-0.1)", "0 <= t <= 1, got t = -0.1"),
    ("loss.TAID(np.float64(-1e-3))", "0 <= t <= 1"),
    ("loss.TAID(jnp.float32(1.5))", "0 <= t <= 1"),
    ("loss.TAID(np.float32(np.nan))", "0 <= t <= 1.*nan"),
    ("loss.TAID(jnp.nan)", "0 <= t <= 1"),
    ("loss.TAID(jnp.array([0.5, 2.0]))", "0 <= t <= 1"),
    ("loss.TAID(jnp.bfloat16(-1))", "0 <= t <= 1"),
    ("loss.TAID('0.5')", "real number for t"),
    ("loss.TAID(None)", "real number for t"),
    ("loss.TAID(True)", "real number for t"),
    ("loss.TAID(0.5j)", "real number for t"),
    ("loss.TAID(jnp.complex64(0.5))", "real number for t"),
    ("loss.TAID([0.5])", "real number for t"),
    ("loss.TAID(jnp.full((2,), 0.5))(x, x)", "scalar t"),
    ("loss.taid_loss(x, x, t=jnp.float32(-1))", "0 <= t <= 1"),
    ("loss.ForwardKL(0)", "temperature > 0 and finite"),
    ("loss.ForwardKL(jnp.float32(0))", "temperature > 0 and finite"),
    ("loss.ReverseKL(np.inf)", "temperature > 0 and finite"),
    ("loss.JensenShannon(temperature=jnp.float32(jnp.nan))", "temperature > 0"),
    ("loss.SkewForwardKL(temperature=np.float32(-1))", "temperature > 0"),
    ("loss.SkewReverseKL(temperature=1e-50)", "temperature > 0"),
    ("loss.AdaptiveKL(temperature=1e300)", "temperature > 0 and finite"),
    ("loss.DKD(temperature=0)", "temperature > 0 and finite, got .* 0"),
    ("loss.DKD(temperature=jnp.inf)", "temperature > 0 and finite"),
    ("loss.DKD(temperature='1')", "real number for temperature"),
    ("loss.ForwardKL(jnp.ones(3))(x, x)", "scalar temperature"),
    ("loss.CTKD(jnp.float32(jnp.nan))", "temperature"),
    ("loss.CTKD(4.0, strength=jnp.float32(2))", "0 <= strength <= 1"),
    ("loss.CTKD(4.0, strength=1.5)", "0 <= strength <= 1, got strength = 1.5"),
    ("loss.ctkd_strength(1, 0)", "num_epochs > 0"),
    # What is part of the program.
    ("loss.JensenShannon(1.0)", "1e-06 <= teacher_weight <= 0.999999, got .* 1.0"),
    ("loss.JensenShannon(0.0)", "1e-06 <= teacher_weight <= 0.999999, got .* 0.0"),
    ("loss.JensenShannon(float('nan'))", "teacher_weight <= 0.999999"),
    # The other side's share would be 1: its logarithm is no number.
    ("loss.SkewReverseKL(1e-20)", "1e-06 <= skew"),
    ("loss.SkewReverseKL(1.5)", "skew <= 0.999999, got .* 1.5"),
    ("loss.SkewForwardKL(-0.1)", "1e-06 <= skew <= 0.999999, got .* -0.1"),
    ("loss.SkewForwardKL(1e-44)", "1e-06 <= skew"),
    ("loss.JensenShannon(jnp.float32(0.5))", "Python number for teacher_weight"),
    ("loss.SkewForwardKL('0.1')", "real number for skew"),
    ("loss.SkewReverseKL([0.1])", "Python number for skew"),
    ("loss.AdaptiveKL(0.0)", "head_threshold <= 1, got .* 0.0"),
    ("loss.AdaptiveKL(1.1)", "head_threshold <= 1, got .* 1.1"),
    ("loss.AdaptiveKL(np.nan)", "head_threshold <= 1"),
    ("loss.AlphaMixture(1.5, 0)", "0 <= t <= 1, got t = 1.5"),
    ("loss.AlphaMixture(0.5, 9.5)", "-9.0 <= shape <= 9.0, got shape = 9.5"),
    ("loss.AlphaMixture(0.5, np.nan)", "shape <= 9.0"),
    ("loss.AlphaMixture(0.5, jnp.float32(0))", "Python number for shape"),
    ("loss.AlphaMixture(jnp.zeros(2), 0)(x, x)", "scalar t"),
    ("loss.AlphaBeta(-0.1, 1)", "0 <= a <= 4.0, got a = -0.1"),
    ("loss.AlphaBeta(1, 4.5)", "0 <= b <= 4.0, got b = 4.5"),
    ("loss.AlphaBeta(0, 0)", "0.01 <= a . b <= 8.0, got a . b = 0"),
    ("loss.AlphaBeta(temperature=0)", "temperature > 0 and finite"),
    ("loss.ConcreteScore('uniform')", "student or teacher for weights, got 'uniform'"),
    ("loss.ConcreteScore(temperature=-1)", "temperature > 0 and finite"),
    ("loss.EntropyGated(-0.1)", "0 <= threshold <= 100.0, got threshold = -0.1"),
    ("loss.EntropyGated(jnp.float32(1))", "Python number for threshold"),
    ("loss.DKD(alpha=-1.0)", "0 <= alpha <= .*, got alpha = -1.0"),
    ("loss.DKD(beta=-0.5)", "0 <= beta <= .*, got beta = -0.5"),
    ("loss.DKD(beta=np.inf)", "beta <= 1000000"),
    ("loss.Mix(loss.ForwardKL(), np.nan)", "0 <= distil_ratio <= 1"),
    ("loss.Mix(loss.ForwardKL(), -0.1)", "distil_ratio <= 1, got distil_ratio = -0.1"),
    ("loss.Mix(loss.ForwardKL(), 2)", "distil_ratio <= 1, got distil_ratio = 2"),
    ("loss.Mix(loss.ForwardKL(), None)", "real number for distil_ratio"),
    ("jax.jit(lambda r: loss.Mix(loss.ForwardKL(), r)(x, x, n))(0.5)", "distil_ratio"),
    # Logits, labels and masks.
    ("loss.ForwardKL()(x.astype('complex64'), x)", "floats for student_logits.*comp"),
    ("loss.ForwardKL()(x, n)", "floats for teacher_logits.*int32"),
    ("loss.TAID(0.5)(x > 0, x)", "floats for student_logits.*bool"),
    ("loss.TAID(0.5)([[0.0, 1.0]], x)", "array of floats for student_logits"),
    ("loss.CTKD(4.0)(x, [[0.0]])", "array of floats for teacher_logits"),
    ("loss.CrossEntropy()(x, None, n.astype('float32'))", "integers for labels"),
    ("loss.CrossEntropy()(x, None, [0, 1])", "integers for labels"),
    ("loss.DKD()(x, x, n.astype('uint32'))", "signed integers for labels"),
    ("loss.DKD()(None, x, n)", "student_logits"),
    ("loss.Mix(loss.TAID(0.5), 0.5)(x, None, n)", "teacher_logits, got None"),
    ("loss.distillation_loss(loss.ForwardKL(), x, x, [1, 0])", "numbers for mask"),
    ("loss.distillation_loss(loss.ForwardKL(), x, x, n * 1j)", "numbers for mask"),
    ("loss.distillation_loss(loss.ForwardKL(), x, x, None, n > 0)", "for labels"),
    # The fused head.
    ("loss.fused_loss(loss.TAID(0.5), x, k, x, h)", r"loss.Head for student_head"),
    ("loss.fused_loss(loss.TAID(0.5), x, h, x, [[1.0]])", "Head for teacher_head"),
    ("loss.fused_loss(loss.TAID(0.5), x, None, x, h)", "Head for student_head"),
    ("loss.fused_loss(loss.TAID(0.5), x, loss.Head([[1.0]]), x, h)", "head.kernel"),
    ("loss.fused_loss(loss.TAID(0.5), x, loss.Head(k, [0.0]), x, h)", "head.bias"),
    ("loss.fused_loss(loss.TAID(0.5), x, loss.Head(k, k[0, 0]), x, h)", "in its bias"),
    ("loss.fused_loss(loss.TAID(0.5), x, loss.Head(k, k), x, h)", "in its bias"),
    ("loss.fused_loss(loss.TAID(0.5), x, loss.Head(k, softcap=0.0), x, h)", "softcap"),
    ("loss.fused_loss(loss.TAID(0.5), x, h, x, loss.Head(k, vocab_size=1.5))", "int"),
    ("loss.fused_loss(loss.TAID(0.5), None, h, x, h)", "need student_hidden"),
    ("loss.fused_loss(loss.TAID(0.5), x, loss.Head(k > 0), x, h)", "head.kernel"),
    ("loss.fused_loss(loss.TAID(0.5), [[1.0]], h, x, h)", "student_hidden"),
    ("loss.fused_loss(loss.TAID(0.5), x, h, n, h)", "teacher_hidden.*int32"),
    ("loss.fused_loss(loss.TAID(0.5), x, h, None, None)", "needs teacher_hidden"),
    ("loss.fused_loss(loss.TAID(0.5), x, h, x, h, [1])", "numbers for mask"),
    ("loss.fused_loss(loss.TAID(0.5), x, h, x, h, None, x)", "for labels"),
    ("loss.fused_loss(loss.TAID(0.5), x, h, x, h, chunk_size=2.5)", "int or None"),
    ("loss.fused_loss(loss.TAID(0.5), x, h, x, h, chunk_size='8')", "int or None"),
    ("loss.fused_loss(loss.TAID(0.5), x, h, x, h, chunk_size=0)", "chunk_size >= 1"),
    ("loss.fused_loss(loss.TAID(0.5), x, h, x, h, mesh='data=1')", "Mesh or None"),
    # The schedule.
    ("schedule.TAIDScheduler(0)", "num_train_steps >= 1"),
    ("schedule.TAIDScheduler(2.5)", "an int for num_train_steps"),
    ("schedule.TAIDScheduler(np.inf)", "an int for num_train_steps"),
    ("schedule.TAIDScheduler('10')", "an int for num_train_steps"),
    ("schedule.TAIDScheduler(10, t_start=np.nan)", "0 <= t_start <= t_end <= 1"),
    ("schedule.TAIDScheduler(10, t_end=jnp.float32(2))", "t_start <= t_end <= 1"),
    ("schedule.TAIDScheduler(10, t_start=-0.1)", "got t_start = -0.1, t_end = 1.0"),
    ("schedule.TAIDScheduler(10, 0.9, 0.5)", "got t_start = 0.9, t_end = 0.5"),
    ("schedule.TAIDScheduler(10, alpha=-1.0)", "finite, got alpha = -1.0"),
    ("schedule.TAIDScheduler(10, beta=-0.5)", "0 <= beta < 1, got beta = -0.5"),
    ("schedule.TAIDScheduler(10, t_start='0')", "real number for t_start"),
    ("schedule.TAIDScheduler(10, t_start=np.complex64(0.5))", "real number for t_st"),
    ("schedule.TAIDScheduler(10, alpha=np.inf)", "alpha >= 0 and finite"),
    ("schedule.TAIDScheduler(10, beta=1.0)", "0 <= beta < 1"),
    ("schedule.TAIDScheduler(10, beta=1 - 1e-9)", "0 <= beta < 1"),
    ("schedule.TAIDScheduler(10, beta=None)", "real number for beta"),
    ("schedule.ScheduledT(0.5)", "callable"),
    ("schedule.ScheduledT(lambda step: jnp.nan * step).init()", "not NaN"),
]

PROGRAM = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from taid_jax import loss, schedule

x, k = jnp.zeros((2, 4)), jnp.zeros((4, 4))
h, n = loss.Head(k), jnp.zeros(2, jnp.int32)
for line in sys.stdin.read().splitlines():
    code, message = line.split("\t")
    try:
        found = eval(code)
    except (TypeError, ValueError) as error:
        if not re.search(message, str(error)) or len(str(error)) > 500:
            print(code, "->", type(error).__name__, error)
    except Exception as error:
        print(code, "->", type(error).__name__, error)
    else:
        print(code, "->", found)
"""


def test_loss_and_schedule_refuse_what_means_nothing():
    """In a process of its own: here annotations are checked before the functions."""
    lines = "".join(f"{code}\t{message}\n" for code, message in WRONG)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout


def test_objectives_take_numbers_of_every_kind_and_whatever_is_traced():
    x = jnp.zeros((2, 4))

    def shape(function, *arguments):
        return jax.eval_shape(function, *arguments).shape

    for number in (0, 1, 0.5, np.float32(0.5), jnp.bfloat16(0.5), jnp.int32(1)):
        assert shape(loss.TAID(number), x, x) == (2,)
    assert shape(loss.JensenShannon(np.float64(0.5), np.int64(2)), x, x) == (2,)
    # Nothing can be known of these; the value shows it.
    of_t = lambda t: loss.TAID(t)(x, x)  # noqa: E731
    for t in (-1.0, 2.0):
        assert shape(of_t, t) == (2,)
    assert shape(jax.vmap(of_t), jnp.array([0.0, 0.5, 1.0])) == (3, 2)
    with pytest.raises(TypeError):
        jax.jit(lambda w: loss.JensenShannon(w)(x, x))(0.5)


def test_a_label_beyond_int32_is_outside_the_vocabulary():
    """Cut to 32 bits it would be one of the entries."""
    logits, head = jnp.zeros((2, 4), "float32"), loss.Head(jnp.eye(4, dtype="float32"))

    @jax.jit
    def run(labels):
        objective = loss.CrossEntropy()
        fused = loss.fused_loss(objective, logits, head, logits, head, None, labels)
        return objective(logits, logits, labels), fused[0]

    with jax.enable_x64(True):
        for label in (2**32, -(2**32), 2**40 + 1):
            losses, total = run(jnp.array([label, 1]))
            np.testing.assert_array_equal(np.isnan(losses), [True, False])
            assert np.isnan(total)


def test_logits_as_large_as_what_stands_for_minus_inf_are_no_distribution():
    """A label's logit of -2e30 was taken for one that is left out: perplexity 1."""
    logits = jnp.array([[2e30, -2e30, 0.0], [1.0, 2.0, 3.0]])
    labels = jnp.array([1, 1])
    for objective in (loss.CrossEntropy(), loss.ForwardKL(), loss.TAID(0.5)):
        losses = jax.jit(objective)(logits, jnp.zeros((2, 3)), labels)
        np.testing.assert_array_equal(jnp.isnan(losses), [True, False])


@pytest.mark.parametrize(
    "kind", ["taid", "jensen_shannon_even", "ctkd", "dkd"], indirect=True
)
def test_objectives_agree_in_every_mode_of_differentiation(kind, make_inputs):
    inputs = make_inputs((3, 17))
    # Nearly equal rows have formulas of their own.
    inputs.teacher[2] = inputs.student[2] + 0.02 * inputs.teacher[2]
    teacher, labels = jnp.asarray(inputs.teacher), jnp.asarray(inputs.labels)
    student = jnp.asarray(inputs.student)
    direction = jnp.cos(jnp.arange(51.0)).reshape(3, 17)
    objective = kind.objective

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
    # The same formulas, fused in other ways.
    np.testing.assert_allclose(forward, jnp.vdot(gradient, direction), rtol=1e-4)
    for other in (saved, rows):
        np.testing.assert_allclose(other, gradient, rtol=1e-4, atol=1e-6)
    step = 1e-2
    change = modes(student + step * direction)[0]
    change -= modes(student - step * direction)[0]
    # A difference quotient of float32 gradients keeps about three digits.
    np.testing.assert_allclose(
        curvature, change / (2 * step), rtol=2e-2, atol=2e-3 * abs(curvature).max()
    )
