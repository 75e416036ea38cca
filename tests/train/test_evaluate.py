import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss
from taid_jax.errors import ModelError
from taid_jax.schedule import TAIDScheduler
from taid_jax.settings import from_dict
from taid_jax.sharding import make_mesh
from taid_jax.train import evaluate as ev
from taid_jax.train.objective import CALIBRATION_BINS, calibration, make_objective
from taid_jax.train.state import DistillState
from taid_jax.types import ModelFunctions

COMPARE = ev.Evaluation(loss.CrossEntropy())
compare = jax.jit(COMPARE)
metrics_of = jax.jit(ev.Evaluation.metrics)


def test_evaluation_is_zero_for_equal_models_and_positive_otherwise():
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(rng.normal(size=(2, 5, 11)) * 3, "float32")
    np.testing.assert_array_equal(compare(a, a), np.zeros(5))
    assert np.all(compare(a, b) > 0)


def test_evaluation_closed_form():
    # Teacher (1/2, 1/2), student (1/4, 3/4).
    teacher = jnp.log(jnp.array([[0.5, 0.5]]))
    student = jnp.log(jnp.array([[0.25, 0.75]]))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    found = compare(student, teacher)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)  # float32
    metrics = metrics_of(COMPARE, student, teacher, jnp.array([1], jnp.int32))
    np.testing.assert_allclose(metrics["student_nll"], [-np.log(0.75)], rtol=1e-6)
    np.testing.assert_allclose(metrics["teacher_nll"], [-np.log(0.5)], rtol=1e-6)


def test_evaluation_excluded_entries_stay_finite():
    student = jnp.array([[0.0, 1.0, -jnp.inf]])
    teacher = jnp.array([[0.0, -jnp.inf, -jnp.inf]])
    assert np.isfinite(compare(student, teacher)).all()


def test_evaluation_leaves_out_what_the_student_excludes():
    """Its tokens that are padding, which a teacher may have weights for."""
    student = jnp.log(jnp.array([[0.75, 0.25, 0.0]]))
    teacher = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
    expected = 0.25 * np.log(1 / 3) + 0.5 * np.log(2)
    found = compare(student, teacher)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)  # float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_evaluation_of_a_row_that_is_no_distribution_is_nan(bad):
    rng = np.random.default_rng(0)
    sides = rng.normal(size=(2, 6, 11)).astype(np.float32)
    sides[0, 0] = sides[1, 1] = bad
    sides[0, 2, 3] = sides[1, 3, 3] = np.inf if np.isneginf(bad) else bad
    # Where the other side has no mass, and nothing else is left.
    sides[1, 4, 5] = sides[0, 4, :5] = sides[0, 4, 6:] = -np.inf
    sides[0, 4, 5] = sides[0, 2, 3]
    found = compare(*map(jnp.asarray, sides))
    np.testing.assert_array_equal(np.isnan(found), np.arange(6) < 5)
    if np.isnan(bad):
        with jax.disable_jit():
            found = COMPARE(*map(jnp.asarray, sides))
        np.testing.assert_array_equal(np.isnan(found), np.arange(6) < 5)


@pytest.mark.parametrize("name", ["kl_teacher", "loss", "student_perplexity"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_selection_metric_of_what_is_not_finite_is_never_the_best(name, value):
    found = ev.HeldOut(1.0, 2.0, 3.0, 4, 1.0, rouge_l=0.9)._replace(**{name: value})
    assert ev.selection_metric(found, name) == math.inf
    # Nor by a score of answers, which a student has whatever it is.
    huge = (name, value) == ("student_perplexity", math.inf)
    assert ev.selection_metric(found, "rouge_l") == (-0.9 if huge else math.inf)


def test_evaluation_adds_the_objective_to_the_same_pass():
    rng = np.random.default_rng(0)
    student, teacher = jnp.asarray(rng.normal(size=(2, 5, 11)) * 3, "float32")
    labels = jnp.asarray(rng.integers(0, 11, 5), "int32")
    evaluation = ev.Evaluation(loss.TAID(jnp.float32(0.3)))
    found = metrics_of(evaluation, student, teacher, labels)
    np.testing.assert_array_equal(
        jax.jit(ev.Evaluation.__call__)(evaluation, student, teacher, labels),
        compare(student, teacher),
    )
    np.testing.assert_array_equal(
        found["objective"],
        jax.jit(loss.TAID.__call__)(loss.TAID(0.3), student, teacher, labels),
    )


def _measured(student, teacher, labels):
    """Float64 oracle of the mean KL(student || teacher) and of the calibration error.

    The label counts among the most probable tokens by its share.
    """
    # -inf in the student takes no part; in the teacher the entry is left out.
    q, p = (
        np.exp(np.float64(x) - np.float64(x).max(-1, keepdims=True))
        for x in (student, teacher)
    )
    q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    both = (q > 0) & (p > 0)
    ratio = np.log(np.where(both, q, 1)) - np.log(np.where(both, p, 1))
    confidence = q.max(-1)
    top = student == student.max(-1, keepdims=True)
    hit = np.take_along_axis(top, labels[:, None], -1)[:, 0] / top.sum(-1)
    error, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    return (q * ratio).sum(-1).mean(), error


@pytest.mark.parametrize(
    ("mesh", "fused"),
    [
        ("data=1", True),
        ("data=1", False),
        pytest.param("data=2,fsdp=2,tensor=2", True, marks=pytest.mark.multidevice),
    ],
)
def test_evaluate_reverse_kl_and_calibration_over_batches(mesh, fused):
    """Of a padded vocabulary with masked tokens, against float64 of all tokens."""
    rng = np.random.default_rng(3)
    vocab, padded, width = 22, 24, 8
    embeddings = rng.normal(size=(2, vocab, width)).astype(np.float32)
    kernels = rng.normal(size=(2, width, padded)).astype(np.float32)
    # As probable as can be, if they counted: padding.
    kernels[:, :, vocab:] *= 100
    # Two entries of every row that tie.
    kernels[:, :, 1] = kernels[:, :, 0]
    functions = ModelFunctions(
        hidden=lambda params, batch: jnp.take(params["e"], batch["input_ids"], axis=0),
        head=lambda params: loss.Head(params["w"], vocab_size=vocab),
    )
    student, teacher = (
        {"e": jnp.asarray(e), "w": jnp.asarray(w)}
        for e, w in zip(embeddings, kernels, strict=True)
    )
    ids = rng.integers(0, vocab, (2, 8, 9)).astype(np.int32)
    labels = np.where(rng.random(ids.shape) < 0.3, -100, ids).astype(np.int32)
    devices = make_mesh(mesh, jax.devices()[: 8 if "tensor" in mesh else 1])
    step = ev.make_eval_step(
        functions, functions, lambda *_: loss.ForwardKL(), mesh=devices, fused=fused
    )
    batches = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    found = ev.evaluate(step, _state(student), teacher, batches, devices)
    counted = labels[:, :, 1:] != -100
    rows = [
        (np.float64(e)[ids] @ np.float64(k[:, :vocab]))[:, :, :-1][counted]
        for e, k in zip(embeddings, kernels, strict=True)
    ]
    reverse, error = _measured(*rows, labels[:, :, 1:][counted])
    # Sums of float32.
    assert found.kl_reverse == pytest.approx(reverse, rel=1e-5)
    assert found.calibration_error == pytest.approx(error, rel=1e-5)


def _calibration_error(logits, labels):
    bins = calibration(jnp.asarray(logits), jnp.asarray(labels))
    return sum(abs(float(jnp.sum(each))) for each in bins.values()) / len(labels)


def test_calibration_closed_form():
    # Two bins, (3/5, 2/3] and (14/15, 1], the first half right, the second wrong.
    logits = np.log([[0.64, 0.36], [0.64, 0.36], [0.04, 0.96], [0.04, 0.96]])
    labels = np.array([0, 1, 0, 0], np.int32)
    found = _calibration_error(np.float32(logits), labels)
    assert found == pytest.approx(0.5 * 0.14 + 0.5 * 0.96, rel=1e-6)  # float32


def test_calibration_of_a_guess_among_equals_is_calibrated():
    logits, labels = np.zeros((4, 4), np.float32), np.arange(4, dtype=np.int32)
    for label in labels:
        assert _calibration_error(logits, np.full(4, label)) == 0
    # And where the equals are the right ones or not: 1/2 less 1/2, 1/2 less 0.
    logits[:, 2:] = -np.inf
    assert _calibration_error(logits, labels) == 0.25


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_calibration_of_a_row_that_is_no_distribution_is_nan(bad):
    logits = np.zeros((2, 4), np.float32)
    logits[1] = bad
    bins = calibration(jnp.asarray(logits), jnp.array([0, -100], jnp.int32))
    for each in bins.values():
        np.testing.assert_array_equal(np.isnan(each), [False, True])
    # One that does not count reaches no sum.
    sums = loss.distillation_sums(
        COMPARE,
        jnp.asarray(logits),
        jnp.zeros((2, 4)),
        labels=jnp.array([0, -100], jnp.int32),
    )[1]
    assert all(np.isfinite(value) for value in sums.values())


def test_evaluate_of_a_student_that_is_nan_is_an_error(models, batches):
    functions, student, teacher = models
    student = {"table": student["table"].at[3, 3].set(jnp.nan)}
    step = ev.make_eval_step(functions, functions, lambda *_: loss.CrossEntropy())
    mesh = make_mesh("data=1", jax.devices()[:1])
    found = ev.evaluate(step, _state(student), teacher, batches, mesh)
    assert math.isnan(found.kl_reverse)
    assert math.isnan(found.calibration_error)
    with pytest.raises(
        ModelError, match=r"the student: not finite .*calibration_error"
    ):
        ev.check_finite(found)


def test_evaluate_weights_by_token_over_batches():
    mesh = make_mesh("data=1", jax.devices()[:1])

    def step(state, teacher_params, batch):
        weight = jnp.sum(batch["labels"] >= 0).astype(jnp.float32)
        return {
            "loss": 2.0 * weight,
            "num_tokens": weight,
            "student_nll": jnp.log(3.0) * weight,
            "teacher_nll": jnp.float32(0.0),
            "objective": 5.0 * weight,
            "kl_reverse": 6.0 * weight,
            # Too sure in one bin and too little in the next.
            **{
                name: 0.02 * weight * (-1) ** number
                for number, name in enumerate(CALIBRATION_BINS)
            },
        }

    batches = [
        {"labels": np.array([[1, 2, -100]], np.int32)},
        {"labels": np.array([[1, -100, -100]], np.int32)},
    ]
    found = ev.evaluate(step, _state({}), {}, batches, mesh)
    assert found.tokens == 3
    np.testing.assert_allclose(found[:3], [2.0, 3.0, 1.0], rtol=1e-6)  # float32
    assert found.loss == 5.0
    assert found.kl_reverse == 6.0
    assert found.calibration_error == pytest.approx(15 * 0.02)
    assert found.rouge_l is None


def test_evaluate_nothing_counted_is_an_error():
    mesh = make_mesh("data=1", jax.devices()[:1])
    with pytest.raises(ValueError, match="no counted token"):
        ev.evaluate(lambda *_: {}, _state({}), {}, [], mesh)


@pytest.mark.parametrize(
    ("best_by", "better", "worse"),
    [
        ("kl_teacher", 0.1, 0.2),
        ("loss", 0.1, 0.2),
        ("student_perplexity", 3.0, 4.0),
        ("rouge_l", 0.4, 0.3),
        ("exact_match", 0.4, 0.3),
    ],
)
def test_selection_metric_is_the_lower_the_better(best_by, better, worse):
    values = better, worse, None
    found = [ev.selection_metric({best_by: value}, best_by) for value in values]
    assert found[0] < found[1] < found[2]
    assert ev.selection_metric({best_by: math.nan}, best_by) == math.inf
    assert ev.selection_metric({}, best_by) == math.inf


def test_selection_metric_of_an_evaluation():
    found = ev.HeldOut(1.0, 2.0, 3.0, 4, rouge_l=0.25)
    assert ev.selection_metric(found, "rouge_l") == -0.25
    assert ev.selection_metric(found, "student_perplexity") == 2.0


def _state(params, t=0.4, learned=None):
    return DistillState(
        step=jnp.int32(7),
        params=params,
        opt_state=(),
        schedule=TAIDScheduler(10).init()._replace(t=jnp.float32(t)),
        learned=learned or {},
    )


VOCAB = 13


@pytest.fixture
def models():
    """A model that is a table of logits, and its functions."""
    rng = np.random.default_rng(0)

    def table():
        return {"table": jnp.asarray(rng.normal(size=(VOCAB, VOCAB)) * 2, "float32")}

    def logits(params, batch):
        return jnp.take(params["table"], batch["input_ids"], axis=0)

    return ModelFunctions(logits=logits), table(), table()


@pytest.fixture
def batches():
    rng = np.random.default_rng(1)
    ids = rng.integers(0, VOCAB, (3, 2, 6)).astype(np.int32)
    labels = np.where(rng.random(ids.shape) < 0.3, -100, ids).astype(np.int32)
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


@pytest.mark.parametrize(
    ("settings", "learned"),
    [
        ({"objective": "taid", "distil_ratio": 0.4}, {}),
        ({"objective": "ctkd"}, {"raw_temperature": 1.5}),
    ],
)
def test_evaluate_loss_is_the_mean_of_the_objective_as_the_state_has_it(
    models, batches, settings, learned
):
    functions, student, teacher = models
    learned = {key: jnp.float32(value) for key, value in learned.items()}
    state = _state(student, t=0.7, learned=learned)
    make, _ = make_objective(from_dict(settings).objective, 10)
    step = ev.make_eval_step(functions, functions, make)
    mesh = make_mesh("data=1", jax.devices()[:1])
    found = ev.evaluate(step, state, teacher, batches, mesh)
    objective = make(state.schedule, state.learned, state.step)
    total = count = 0.0
    for batch in batches:
        labels = jnp.asarray(batch["labels"])[:, 1:]
        loss_sum, sums = loss.distillation_sums(
            objective,
            functions.logits(student, batch)[:, :-1],
            functions.logits(teacher, batch)[:, :-1],
            labels != -100,
            labels,
        )
        total, count = total + float(loss_sum), count + float(sums["num_tokens"])
    assert found.tokens == count
    # The same float32 sums, in another order.
    np.testing.assert_allclose(found.loss, total / count, rtol=1e-5)


def test_evaluate_leaves_the_state_as_it_is_and_repeats_itself(models, batches):
    functions, student, teacher = models
    state = _state(student)
    before = jax.tree.map(np.array, state)
    make, _ = make_objective(from_dict({}).objective, 10)
    step = ev.make_eval_step(functions, functions, make)
    mesh = make_mesh("data=1", jax.devices()[:1])
    first = ev.evaluate(step, state, teacher, batches, mesh)
    again = ev.evaluate(step, state, teacher, batches, mesh)
    assert first == again
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
