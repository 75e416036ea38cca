"""Every objective against float64 and the recordings, and what each promises alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.loss import (
    CTKD,
    DKD,
    TAID,
    AdaptiveKL,
    AlphaBeta,
    AlphaMixture,
    ConcreteScore,
    EntropyGated,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    ctkd_temperature,
)
from taid_jax.loss._divergences import _head_entries as head_entries
from taid_jax.loss._softmax import expm1_near, normalise

pytestmark = pytest.mark.optimised


def total_error(gradient, expected):
    return np.linalg.norm(gradient - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("scale", "noise"),
    [(1.0, None), (1.0, 1e-3), (3.0, 1.0), (12.0, 1e-3), (30.0, None), (30.0, 1.0)],
)
def test_every_objective_agrees_with_float64(case, make_inputs, evaluate, scale, noise):
    inputs = make_inputs((16, 257), scale, noise)
    losses, gradient = evaluate(
        case.make(), inputs.student, inputs.teacher, inputs.labels
    )
    expected, exact = case.expect(inputs.student, inputs.teacher, inputs.labels)
    # Float32 sums of 257 terms; a divergence of nearly equal rows is a difference of
    # numbers near 1, and DKD's temperature of 3 multiplies its errors by 9.
    np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=1e-5)
    # The norm over all tokens: that of a single one can be 1e-12 where the student is
    # certain, and JS, TVD and skew reverse KL then keep no more than its size.
    assert total_error(gradient, exact) < 2e-6


RECORDED = {
    **{f"taid_{t}": TAID(t) for t in (0.0, 0.25, 0.4, 0.75, 1.0)},
    "ctkd": CTKD(ctkd_temperature(1.0)),
    "dkd": DKD(),
    "fkl": ForwardKL(),
    "rkl": ReverseKL(),
    "tvd": TotalVariation(),
    "js": JensenShannon(),
    "js_0.5": JensenShannon(0.5),
    "skew_fkl": SkewForwardKL(),
    "skew_rkl": SkewReverseKL(),
}


@pytest.mark.parametrize("objective", RECORDED)
@pytest.mark.parametrize(
    "name",
    [
        "small",
        "neg_inf",
        # `python -m parity` has these too.
        *(
            pytest.param(name, marks=pytest.mark.parity)
            for name in ("wide", "peaked", "bf16")
        ),
    ],
)
def test_objectives_agree_with_the_recorded_outputs(
    recorded, golden_losses, mean_loss, name, objective
):
    dtype = jnp.bfloat16 if name == "bf16" else jnp.float32
    loss, gradient = mean_loss(
        RECORDED[objective], recorded(name, dtype), golden_losses[f"{name}/mask"]
    )
    gradient = gradient.astype(np.float32)
    value = golden_losses[f"{name}/{objective}/loss"]
    published = golden_losses[f"{name}/{objective}/grad"]
    exact = objective.startswith(("taid", "ctkd", "dkd"))
    if objective == "dkd":
        # The published mean is over all positions, padding included.
        share = golden_losses[f"{name}/mask"].mean()
        loss, gradient = loss * share, gradient * share
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    if exact and name == "bf16":
        return  # rounded in the middle where it was recorded
    if np.isfinite(value):
        # Float32 on both sides; elsewhere 0 * -inf in the published form.
        np.testing.assert_allclose(loss, value, rtol=2e-6 if exact else 3e-6)
    if objective == "taid_0.0":  # the recording holds what rounding left of 0
        assert not gradient.any()
    elif np.isfinite(published).all():
        # The recorded gradient has no more digits than this where it is 1e-6.
        limit = 5e-4 if name in ("peaked", "bf16") else 1e-5
        assert total_error(gradient, published) < (5e-6 if exact else limit)


def test_adaptive_kl_differs_from_the_recording_by_the_published_mask(
    recorded, golden_losses, mean_loss, oracle
):
    """The published mask is of another order than what it masks."""
    inputs = recorded("small")
    mask = golden_losses["small/mask"]
    loss, gradient = mean_loss(AdaptiveKL(), inputs, mask)
    values, exact = oracle("adaptive_kl", inputs.student, inputs.teacher)
    np.testing.assert_allclose(loss, values[mask == 1].mean(), rtol=1e-6)
    assert total_error(gradient, exact * mask[..., None] / mask.sum()) < 1e-6
    assert abs(loss - golden_losses["small/adaptive_kl/loss"]) > 0.1


P, Q = np.array([0.125, 0.375, 0.5]), np.array([0.5, 0.25, 0.25])
"""A teacher and a student that are easy to do sums with."""


def _kl(p, q):
    return (p * np.log(p / q)).sum()


def _cross(p, q):
    return -(p * np.log(q)).sum()


CLOSED_FORMS = [
    (ForwardKL(), _cross(P, Q)),
    (ReverseKL(), _kl(Q, P)),
    (TotalVariation(), 0.375),
    # The teacher's weight is its share of the mixture and of the sum.
    (
        JensenShannon(0.1),
        0.1 * _kl(P, 0.1 * P + 0.9 * Q) + 0.9 * _kl(Q, 0.1 * P + 0.9 * Q),
    ),
    # Both skew KLs mix on their own side.
    (SkewForwardKL(0.1), _cross(P, 0.1 * P + 0.9 * Q)),
    (SkewReverseKL(0.1), _kl(Q, 0.9 * P + 0.1 * Q)),
    # The head is the last entry alone, which holds one half; the gap there is 0.25 of
    # 0.75 in all.
    (AdaptiveKL(), _cross(P, Q) / 3 + _kl(Q, P) * 2 / 3),
    (AlphaMixture(0.25, -1), _cross(0.25 * P + 0.75 * Q, Q)),
    (
        AlphaBeta(0.2, 0.7),
        ((P**0.9 * 2 + Q**0.9 * 7) / 9 - P**0.2 * Q**0.7).sum() / 0.14,
    ),
    (ConcreteScore(), 2 * ((Q * np.log(P / Q) ** 2).sum() - _kl(Q, P) ** 2)),
    (ConcreteScore("teacher"), 2 * ((P * np.log(P / Q) ** 2).sum() - _kl(P, Q) ** 2)),
    # The teacher's entropy is 0.97 nats.
    (EntropyGated(0.95), _kl(Q, P) + _kl(P, Q)),
    (EntropyGated(1.0), _kl(Q, P)),
]


@pytest.mark.parametrize(
    ("objective", "expected"),
    CLOSED_FORMS,
    ids=lambda value: type(value).__name__,
)
def test_objective_closed_form(make_inputs, evaluate, objective, expected):
    inputs = make_inputs()
    for array, row in ((inputs.student, Q), (inputs.teacher, P)):
        array[:] = -np.inf
        array[..., :3] = np.log(row)
    losses, _ = evaluate(objective, inputs.student, inputs.teacher, inputs.labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)  # sums that cancel


@pytest.mark.parametrize("threshold", [1e-6, 0.3, 0.5, 0.9, 1.0])
def test_head_entries_are_those_of_a_sort(make_inputs, threshold):
    teacher = make_inputs((6, 40)).teacher
    teacher[1, :] = 0.5
    teacher[2, 3:] = -np.inf
    row = normalise(jnp.asarray(teacher))
    p = np.asarray(row.exp / row.total, np.float64)
    head = np.asarray(jax.jit(head_entries, static_argnums=1)(row, threshold))
    for row_head, row_p in zip(head, p, strict=True):
        order = np.sort(row_p)[::-1]
        before = np.concatenate([[0], np.cumsum(order)[:-1]])
        # The last entry of a head of everything hangs on rounding: leave it some.
        slack = min(1e-6, threshold / 2)
        least = order[before < threshold - slack].min()
        assert (row_head[row_p > least]).all()
        assert row_p[row_head].sum() >= threshold - slack
        # Equally probable entries belong together.
        assert len({bool(x) for x in row_head[row_p == least]}) == 1
        if threshold < 1:
            np.testing.assert_array_equal(row_head, row_p >= least)


def test_head_entries_tell_neighbouring_floats_apart():
    row = normalise(jnp.array([[0.0, -6e-8, -30.0]]))
    np.testing.assert_array_equal(head_entries(row, 0.4), [[True, False, False]])
    np.testing.assert_array_equal(head_entries(row, 0.9), [[True, True, False]])


def test_true_divergences_are_zero_at_equal_distributions(case, make_inputs, evaluate):
    inputs = make_inputs()
    losses, gradient = evaluate(
        case.make(), inputs.student, inputs.student, inputs.labels
    )
    if case.divergence:
        np.testing.assert_allclose(losses, 0, atol=1e-6)
    if case.name not in ("cross_entropy", "dkd", "dkd_warm"):
        assert not gradient.any()
    # A shift of all logits changes nothing either.
    _, shifted = evaluate(
        case.make(), inputs.student, inputs.student + np.float32(8), inputs.labels
    )
    if case.name not in ("cross_entropy", "total_variation"):  # its slope is a sign
        # Adding 8 rounds the logits by up to 5e-7, times T^2 of the warm ones.
        np.testing.assert_allclose(shifted, gradient, atol=1e-5)


def test_every_objective_ignores_the_order_of_the_vocabulary(
    case, make_inputs, evaluate
):
    inputs = make_inputs()
    order = np.random.default_rng(1).permutation(33)
    losses, gradient = evaluate(
        case.make(), inputs.student, inputs.teacher, inputs.labels
    )
    moved, moved_gradient = evaluate(
        case.make(),
        inputs.student[..., order],
        inputs.teacher[..., order],
        np.argsort(order)[inputs.labels].astype(np.int32),
    )
    # Order of the sums.
    np.testing.assert_allclose(moved, losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        moved_gradient, gradient[..., order], rtol=1e-4, atol=1e-6
    )


def test_every_objective_gives_the_teacher_no_gradient(
    case, make_inputs, run_objective
):
    inputs = make_inputs()
    _, student, teacher = run_objective(
        case.make(), inputs.student, inputs.teacher, inputs.labels
    )
    assert student.any()
    np.testing.assert_array_equal(teacher, np.zeros_like(teacher))


def test_every_objective_leaves_out_entries_of_minus_infinity(
    case, make_inputs, evaluate
):
    inputs = make_inputs()
    student, teacher, labels = inputs.student, inputs.teacher, inputs.labels
    student[0, 0, 3] = student[0, 1, :20] = -np.inf
    teacher[0, 0, 4] = teacher[0, 2, :20] = -np.inf
    student[0, 3, 5:9] = teacher[0, 3, 5:9] = -np.inf
    teacher[0, 4, student[0, 4].argmax()] = -np.inf
    student[1, 0, 1:] = -np.inf
    labels[0, 1], labels[1, 0] = 25, 0
    losses, gradient = evaluate(case.make(), student, teacher, labels)
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()
    assert not gradient[np.isneginf(student)].any()
    expected, exact = case.expect(student, teacher, labels)
    if case.name.startswith("dkd"):
        # KLs with terms left out can be below 0 and are cut off there; and with one
        # entry left there is no rest to speak of.
        expected[0, 1] = losses[0, 1]
        expected[1, 0], exact[1, 0] = losses[1, 0], gradient[1, 0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=1e-6)


def _spoil(inputs, side, bad):
    """Makes of one side's rows, of the first eight tokens, no distributions any more.

    Returns which tokens are spoiled.
    """
    rows, others = (x.reshape(10, 33)[:8] for x in (inputs.student, inputs.teacher))
    if side == "teacher":
        rows, others = others, rows
    tokens = np.arange(8)
    rows[0] = bad
    rows[1, 0] = bad
    rows[tokens[2:], rows[2:].argmax(-1)] = bad
    # At the label; where the other side excludes it; and beside excluded entries.
    rows[3, inputs.labels.ravel()[3]] = bad
    others[4, rows[4].argmax()] = -np.inf
    rows[5, 3:9], rows[5, 9] = -np.inf, bad
    others[6, 1:] = rows[6, :-1] = -np.inf
    rows[6, -1] = bad
    rows[7, 1:] = -np.inf
    rows[7, 0] = bad
    others[7, 0] = -np.inf
    return np.arange(10).reshape(2, 5) < 8


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_every_objective_of_a_row_that_is_no_distribution_is_nan(
    case, make_inputs, run_objective, side
):
    """NaN, inf, or -inf throughout; a loss of 0 would be the best there is."""
    unseen = case.name == "cross_entropy" and side == "teacher"
    for bad in (np.nan, np.inf):
        inputs = make_inputs()
        spoiled = _spoil(inputs, side, bad) & (not unseen)
        losses, gradient, _ = run_objective(
            case.make(), inputs.student, inputs.teacher, inputs.labels
        )
        # One row does not reach another.
        np.testing.assert_array_equal(np.isnan(losses), spoiled)
        np.testing.assert_array_equal(np.isnan(gradient).any(-1), spoiled)
    inputs = make_inputs()
    getattr(inputs, side)[0, 2] = -np.inf
    losses = run_objective(case.make(), inputs.student, inputs.teacher, inputs.labels)
    wanted = (np.arange(10) == 2).reshape(2, 5) & (not unseen)
    np.testing.assert_array_equal(np.isnan(losses[0]), wanted)


@pytest.fixture
def metrics():
    """`metrics(objective, student, teacher, labels)`."""

    def run(objective, *arrays):
        arrays = [jnp.asarray(array) for array in arrays]
        return jax.jit(type(objective).metrics)(objective, *arrays)

    return run


def test_every_metric_of_a_row_that_is_no_distribution_is_nan(
    case, make_inputs, metrics
):
    for side in ("student", "teacher"):
        inputs = make_inputs()
        spoiled = _spoil(inputs, side, np.nan)
        found = metrics(case.make(), inputs.student, inputs.teacher, inputs.labels)
        np.testing.assert_array_equal(np.isnan(found["kl_teacher"]), spoiled)


@pytest.mark.parametrize("make", [lambda: TAID(0.4), JensenShannon])
def test_objectives_that_are_not_compiled_do_not_hide_nan(make, make_inputs):
    for side in ("student", "teacher"):
        inputs = make_inputs()
        spoiled = _spoil(inputs, side, np.nan)
        arrays = map(jnp.asarray, (inputs.student, inputs.teacher, inputs.labels))
        with jax.disable_jit():
            losses = make()(*arrays)
        np.testing.assert_array_equal(np.isnan(losses), spoiled)


def test_a_vocabulary_padded_with_minus_infinity_is_the_smaller_one(
    case, make_inputs, evaluate
):
    inputs = make_inputs()
    student, teacher = inputs.student, inputs.teacher
    student[..., 26:] = teacher[..., 26:] = -np.inf
    labels = inputs.labels % 26
    losses, gradient = evaluate(case.make(), student, teacher, labels)
    expected, exact = case.expect(student[..., :26], teacher[..., :26], labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient[..., :26], exact, rtol=1e-4, atol=1e-6)
    assert not gradient[..., 26:].any()


def test_every_objective_of_large_logits_is_finite(case, make_inputs, evaluate):
    inputs = make_inputs()
    student, teacher = inputs.student, inputs.teacher
    student[0, :3, :4] = [[0, 1e5, -1e5, 1], [1e4, 2, 3, 4], [0, 0, 0, 0]]
    teacher[0, :3, :4] = [[1e5, 0, -1e5, 2], [4, 3, 1e4, 1], [-1e5, 9, 9, 0]]
    inputs.labels[0, :3] = [2, 1, 0]
    student[1] *= 1e3
    losses, gradient = evaluate(case.make(), student, teacher, inputs.labels)
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda t: ForwardKL(t),
        lambda t: ReverseKL(t),
        lambda t: JensenShannon(temperature=t),
        lambda t: SkewForwardKL(temperature=t),
        lambda t: SkewReverseKL(temperature=t),
        lambda t: AdaptiveKL(temperature=t),
        lambda t: AlphaBeta(temperature=t),
        lambda t: ConcreteScore(temperature=t),
        lambda t: EntropyGated(0.5, temperature=t),
    ],
)
def test_temperature_squared_multiplies_value_and_gradient(make_inputs, evaluate, make):
    """At a high temperature the gradient of a divergence no longer depends on it."""
    inputs = make_inputs(scale=1.0)
    at_one, gradient_at_one = evaluate(
        make(jnp.float32(1)), inputs.student / 4, inputs.teacher / 4
    )
    losses, gradient = evaluate(make(jnp.float32(4)), inputs.student, inputs.teacher)
    # T^2 f(s / T) and its derivative T f'(s / T); division by 4 is exact.
    np.testing.assert_allclose(losses, 16 * at_one, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, 4 * gradient_at_one, rtol=1e-4, atol=1e-7)


def test_temperature_does_not_compile_again(make_inputs):
    inputs = make_inputs()
    traces = []

    @jax.jit
    def loss(objective):
        traces.append(1)
        return jnp.sum(
            objective(jnp.asarray(inputs.student), jnp.asarray(inputs.teacher))
        )

    assert len({float(loss(ForwardKL(t))) for t in (1.0, 2.0, 3.5)}) == 3
    assert len(traces) == 1


def test_every_objective_names_kl_at_temperature_one(
    case, make_inputs, oracle, metrics
):
    inputs = make_inputs()
    found = metrics(case.make(), inputs.student, inputs.teacher, inputs.labels)
    cross, _ = oracle("forward_kl", inputs.student, inputs.teacher)
    entropy, _ = oracle("forward_kl", inputs.teacher, inputs.teacher)
    np.testing.assert_allclose(
        found["kl_teacher"], cross - entropy, rtol=1e-5, atol=1e-6
    )


def test_kl_teacher_leaves_out_what_the_student_excludes(kind, make_inputs, metrics):
    """Sums over the student's entries alone, also of a mass that the teacher has."""
    inputs = make_inputs()
    for array in (inputs.student, inputs.teacher):
        array[:] = -np.inf
        array[..., 0] = 0
    with np.errstate(divide="ignore"):
        inputs.student[0, :2, :3] = np.log([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25]])
        inputs.teacher[0, :2, :3] = np.log([[0.25, 0.5, 0.25], [0.0, 0.5, 0.5]])
    labels = np.zeros((2, 5), np.int32)
    labels[0, 1] = 1
    found = metrics(kind.make(), inputs.student, inputs.teacher, labels)
    expected = [0.25 * np.log(1 / 3) + 0.5 * np.log(2), np.log(2)]
    kl = found["kl_teacher"][0, :2]
    np.testing.assert_allclose(kl, expected, rtol=1e-6)  # float32


def test_adaptive_kl_sends_no_gradient_through_its_weights(make_inputs, evaluate):
    """Its gradient is the weighted one of the two, with the weights held fixed."""
    inputs = make_inputs()
    both, gradient = evaluate(AdaptiveKL(), inputs.student, inputs.teacher)
    forward, in_forward = evaluate(ForwardKL(), inputs.student, inputs.teacher)
    reverse, in_reverse = evaluate(ReverseKL(), inputs.student, inputs.teacher)
    weight = (both - reverse) / (forward - reverse)
    weight = weight[..., None]
    expected = weight * in_forward + (1 - weight) * in_reverse
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_expm1_near_is_exact():
    x = np.concatenate([np.linspace(-0.5, 0.5, 2001), np.logspace(-30, -1, 200)])
    x = np.concatenate([x, -x]).astype(np.float32)
    # Two units in the last place.
    np.testing.assert_allclose(
        expm1_near(jnp.asarray(x)), np.expm1(x.astype(np.float64)), rtol=2.4e-7
    )
