"""Every objective against float64, and the float64 oracle against its definitions."""

import functools
import pathlib

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
    CrossEntropy,
    EntropyGated,
    ForwardKL,
    JensenShannon,
    Mix,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from taid_jax.loss._divergences import _head_entries as head_entries
from taid_jax.loss._softmax import expm1_near, normalise

pytestmark = pytest.mark.optimised

GOLDEN = pathlib.Path(__file__).parents[2] / "parity" / "golden" / "losses.npz"
P, Q = np.array([0.125, 0.375, 0.5]), np.array([0.5, 0.25, 0.25])
"""A teacher and a student that are easy to do sums with."""


def _kl(p, q):
    return (p * np.log(p / q)).sum()


def _cross(p, q):
    return -(p * np.log(q)).sum()


def _power_mean(t, power):
    mean = (t * P**power + (1 - t) * Q**power) ** (1 / power)
    return mean / mean.sum()


def _over_pairs(weights):
    gap = np.log(P / Q)
    pairs = (gap[:, None] - gap) ** 2
    return (weights[:, None] * weights * pairs).sum()


GEOMETRIC = Q**0.75 * P**0.25 / (Q**0.75 * P**0.25).sum()
# The label is the first entry; the others are a distribution of their own.
TARGET = 0.125 * np.log(0.125 / 0.5) + 0.875 * np.log(0.875 / 0.5)
OTHERS = _kl(P[1:] / 0.875, Q[1:] / 0.5)
CLOSED_FORMS = [
    ("taid", {"t": 0.25}, _cross(GEOMETRIC, Q)),
    ("forward_kl", {}, _cross(P, Q)),
    ("reverse_kl", {}, _kl(Q, P)),
    ("total_variation", {}, 0.375),
    # The teacher's weight is its share of the mixture and of the sum.
    (
        "jensen_shannon",
        {"teacher_weight": 0.1},
        0.1 * _kl(P, 0.1 * P + 0.9 * Q) + 0.9 * _kl(Q, 0.1 * P + 0.9 * Q),
    ),
    # Both skew KLs mix on their own side.
    ("skew_forward_kl", {"teacher_weight": 0.1}, _cross(P, 0.1 * P + 0.9 * Q)),
    ("skew_reverse_kl", {"teacher_weight": 0.1}, _kl(Q, 0.9 * P + 0.1 * Q)),
    # The head is the last entry alone, which holds one half; the gap there is 0.25 of
    # 0.75 in all.
    ("adaptive_kl", {"head_threshold": 0.5}, _cross(P, Q) / 3 + _kl(Q, P) * 2 / 3),
    ("alpha_mixture", {"t": 0.25, "shape": 1.0}, _cross(GEOMETRIC, Q)),
    ("alpha_mixture", {"t": 0.25, "shape": -1.0}, _cross(_power_mean(0.25, 1), Q)),
    ("alpha_mixture", {"t": 0.25, "shape": 3.0}, _cross(_power_mean(0.25, -1), Q)),
    ("alpha_beta", {"a": 1, "b": 0}, _kl(P, Q)),
    ("alpha_beta", {"a": 0, "b": 1}, _kl(Q, P)),
    (
        "alpha_beta",
        {"a": 0.2, "b": 0.7},
        ((P**0.9 * 2 + Q**0.9 * 7) / 9 - P**0.2 * Q**0.7).sum() / 0.14,
    ),
    ("concrete_score", {"weights": "student"}, _over_pairs(Q)),
    ("concrete_score", {"weights": "teacher"}, _over_pairs(P)),
    # The teacher's entropy is 0.97 nats.
    ("entropy_gated", {"threshold": 0.95}, _kl(Q, P) + _kl(P, Q)),
    ("entropy_gated", {"threshold": 1.0}, _kl(Q, P)),
    ("ctkd", {}, _cross(P, Q)),
    ("dkd", {"alpha": 2.0, "beta": 3.0}, 2 * TARGET + 3 * OTHERS),
    ("sft", {}, np.log(2)),
]


def test_oracle_is_what_the_definitions_say(oracle):
    """Every objective is held against it."""
    for name, numbers, expected in CLOSED_FORMS:
        rows = np.log(Q)[None], np.log(P)[None], np.array([0])
        np.testing.assert_allclose(oracle(name, *rows, **numbers)[0], expected)
        # A temperature divides the logits, and its square multiplies the loss.
        wide = 3 * np.log(Q)[None], 3 * np.log(P)[None], np.array([0])
        found, _ = oracle(name, *wide, **numbers, temperature=3.0)
        np.testing.assert_allclose(found, 9 * expected)


def test_objectives_are_what_the_definitions_say():
    """Without PyTorch."""
    classes = {
        "taid": TAID,
        "forward_kl": ForwardKL,
        "reverse_kl": ReverseKL,
        "total_variation": TotalVariation,
        "jensen_shannon": JensenShannon,
        "skew_forward_kl": SkewForwardKL,
        "skew_reverse_kl": SkewReverseKL,
        "adaptive_kl": AdaptiveKL,
        "alpha_mixture": AlphaMixture,
        "alpha_beta": AlphaBeta,
        "concrete_score": ConcreteScore,
        "entropy_gated": EntropyGated,
        "ctkd": functools.partial(CTKD, 1.0),
        "dkd": DKD,
        "sft": CrossEntropy,
    }
    objectives = [classes[name](*numbers.values()) for name, numbers, _ in CLOSED_FORMS]

    @jax.jit
    def run(student, teacher):
        label = jnp.array([0])
        return [objective(student, teacher, label) for objective in objectives]

    losses = run(*(jnp.log(jnp.float32(row))[None] for row in (Q, P)))
    expected = [[value] for *_, value in CLOSED_FORMS]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_oracle_gives_the_recorded_outputs(oracle):
    """Of the published code, where that is right; `python -m parity` has the rest."""
    names = {
        "fkl": ("forward_kl", {}),
        "rkl": ("reverse_kl", {}),
        "tvd": ("total_variation", {}),
        "js": ("jensen_shannon", {}),
        "js_0.5": ("jensen_shannon", {"teacher_weight": 0.5}),
        "skew_fkl": ("skew_forward_kl", {}),
        "skew_rkl": ("skew_reverse_kl", {}),
        **{f"taid_{t}": ("taid", {"t": t}) for t in (0.25, 0.4, 0.75, 1.0)},
    }
    with np.load(GOLDEN) as recorded:
        rows = recorded["small/student"], recorded["small/teacher"]
        mask = recorded["small/mask"]
        for key, (name, numbers) in names.items():
            losses, gradient = oracle(name, *rows, **numbers)
            value = (losses * mask).sum() / mask.sum()
            np.testing.assert_allclose(value, recorded[f"small/{key}/loss"], rtol=3e-6)
            gradient *= mask[..., None] / mask.sum()
            assert total_error(recorded[f"small/{key}/grad"], gradient) < 1e-5


def total_error(gradient, expected):
    return np.linalg.norm(gradient - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("scale", "noise"),
    [(1.0, None), (1.0, 1e-3), (3.0, 1.0), (12.0, 1e-3), (30.0, None), (30.0, 1.0)],
)
def test_every_objective_agrees_with_float64(
    case, make_inputs, run_objective, scale, noise
):
    inputs = make_inputs((2, 5, 33), scale, noise)
    arrays = inputs.student, inputs.teacher, inputs.labels
    losses, gradient, in_teacher = run_objective(case.objective, *arrays)
    expected, exact = case.expect(*arrays)
    # Float32 sums; a divergence of nearly equal rows is a difference of numbers near 1,
    # and DKD's temperature of 3 multiplies its errors by 9.
    np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=1e-5)
    # The norm over all tokens: that of a single one can be 1e-12 where the student is
    # certain, and JS, TVD and skew reverse KL then keep no more than its size.
    assert total_error(gradient, exact) < 2e-6
    assert not in_teacher.any()


@pytest.mark.parametrize(
    "powers", [(0.2, 0.7), (0, 1), (1, 0), (1, 1e-6), (0.5, 1.5), (1e-4, 1)]
)
def test_alpha_beta_gradient_is_exact_to_float32(make_inputs, evaluate, oracle, powers):
    """Every token by its own norm, a certain student's and a near teacher's too."""
    a, b = powers
    for scale, noise in (
        *((1, None), (1, 1e-3), (3, 1.0), (10, 1e-3), (10, 1e-2)),
        *((30, None), (30, 1e-3)),
    ):
        inputs = make_inputs((8, 257), scale, noise)
        _, gradient = evaluate(AlphaBeta(a, b), inputs.student, inputs.teacher)
        _, exact = oracle("alpha_beta", inputs.student, inputs.teacher, a=a, b=b)
        error = np.linalg.norm(gradient - exact, axis=-1)
        # At scale 30 a logarithm of a probability reaches 150: 150 * 2^-24.
        limit = 1e-5 if scale < 30 else 5e-5
        assert (error < limit * np.linalg.norm(exact, axis=-1)).all(), (scale, noise)


def test_head_entries_are_those_of_a_sort(make_inputs):
    teacher = make_inputs((6, 40)).teacher
    teacher[1, :] = 0.5
    teacher[2, 3:] = -np.inf
    row = normalise(jnp.asarray(teacher))
    p = np.asarray(row.exp / row.total, np.float64)
    for threshold in (1e-6, 0.3, 0.5, 0.9, 1.0):
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
        case.objective, inputs.student, inputs.student, inputs.labels
    )
    if case.zero:
        np.testing.assert_allclose(losses, 0, atol=1e-6)
    if case.name not in ("cross_entropy", "dkd", "dkd_warm"):
        assert not gradient.any()
    # A shift of all logits changes nothing either.
    _, shifted = evaluate(
        case.objective, inputs.student, inputs.student + np.float32(8), inputs.labels
    )
    if case.name not in ("cross_entropy", "total_variation"):  # its slope is a sign
        # Adding 8 rounds the logits by up to 5e-7, times T^2 of the warm ones.
        np.testing.assert_allclose(shifted, gradient, atol=1e-5)


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
    losses, gradient = evaluate(case.objective, student, teacher, labels)
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
            case.objective, inputs.student, inputs.teacher, inputs.labels
        )
        # One row does not reach another.
        np.testing.assert_array_equal(np.isnan(losses), spoiled)
        np.testing.assert_array_equal(np.isnan(gradient).any(-1), spoiled)
    inputs = make_inputs()
    getattr(inputs, side)[0, 2] = -np.inf
    losses = run_objective(
        case.objective, inputs.student, inputs.teacher, inputs.labels
    )
    wanted = (np.arange(10) == 2).reshape(2, 5) & (not unseen)
    np.testing.assert_array_equal(np.isnan(losses[0]), wanted)


def test_objectives_that_are_not_compiled_do_not_hide_nan(make_inputs):
    for side in ("student", "teacher"):
        inputs = make_inputs()
        spoiled = _spoil(inputs, side, np.nan)
        arrays = map(jnp.asarray, (inputs.student, inputs.teacher, inputs.labels))
        with jax.disable_jit():
            losses = TAID(0.4)(*arrays)
        np.testing.assert_array_equal(np.isnan(losses), spoiled)


def test_every_objective_of_large_logits_is_finite(case, make_inputs, evaluate):
    inputs = make_inputs()
    student, teacher = inputs.student, inputs.teacher
    student[0, :3, :4] = [[0, 1e5, -1e5, 1], [1e4, 2, 3, 4], [0, 0, 0, 0]]
    teacher[0, :3, :4] = [[1e5, 0, -1e5, 2], [4, 3, 1e4, 1], [-1e5, 9, 9, 0]]
    inputs.labels[0, :3] = [2, 1, 0]
    student[1] *= 1e3
    losses, gradient = evaluate(case.objective, student, teacher, inputs.labels)
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()


@pytest.fixture(scope="module")
def metrics():
    """`metrics(objective, student, teacher, labels)`."""
    run = jax.jit(lambda objective, *arrays: objective.metrics(*arrays))
    return lambda objective, *arrays: run(objective, *map(jnp.asarray, arrays))


def test_objectives_name_kl_at_temperature_one(kind, make_inputs, oracle, metrics):
    inputs = make_inputs()
    found = metrics(kind.objective, inputs.student, inputs.teacher, inputs.labels)
    cross, _ = oracle("forward_kl", inputs.student, inputs.teacher)
    entropy, _ = oracle("forward_kl", inputs.teacher, inputs.teacher)
    np.testing.assert_allclose(
        found["kl_teacher"], cross - entropy, rtol=1e-5, atol=1e-6
    )
    for side in ("student", "teacher"):
        inputs = make_inputs()
        spoiled = _spoil(inputs, side, np.nan)
        found = metrics(kind.objective, inputs.student, inputs.teacher, inputs.labels)
        np.testing.assert_array_equal(np.isnan(found["kl_teacher"]), spoiled)


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
    found = metrics(kind.objective, inputs.student, inputs.teacher, labels)
    expected = [0.25 * np.log(1 / 3) + 0.5 * np.log(2), np.log(2)]
    kl = found["kl_teacher"][0, :2]
    np.testing.assert_allclose(kl, expected, rtol=1e-6)  # float32


@pytest.mark.parametrize(
    "make",
    [
        TAID,
        ForwardKL,
        CTKD,
        lambda number: AdaptiveKL(temperature=number),
        lambda number: AlphaMixture(number, 0),
        lambda number: Mix(TAID(number), 0.5),
    ],
)
def test_numbers_that_may_be_traced_do_not_compile_again(make):
    structures = {jax.tree.structure(make(number)) for number in (0.1, 0.5, 0.9)}
    assert len(structures) == 1
    assert 0.9 in jax.tree.leaves(make(0.9))


def test_expm1_near_is_exact():
    x = np.concatenate([np.linspace(-0.5, 0.5, 2001), np.logspace(-30, -1, 200)])
    x = np.concatenate([x, -x]).astype(np.float32)
    # Two units in the last place.
    np.testing.assert_allclose(
        expm1_near(jnp.asarray(x)), np.expm1(x.astype(np.float64)), rtol=2.4e-7
    )
