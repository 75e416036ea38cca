import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import evaluate as ev
from taid_jax.sharding import make_mesh


def test_comparison_is_zero_for_equal_models_and_positive_otherwise():
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(rng.normal(size=(2, 5, 11)) * 3, "float32")
    np.testing.assert_array_equal(ev.Comparison()(a, a), np.zeros(5))
    assert np.all(ev.Comparison()(a, b) > 0)


def test_comparison_closed_form():
    # Teacher (1/2, 1/2), student (1/4, 3/4).
    teacher = jnp.log(jnp.array([[0.5, 0.5]]))
    student = jnp.log(jnp.array([[0.25, 0.75]]))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    found = ev.Comparison()(student, teacher)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)  # float32
    metrics = ev.Comparison().metrics(student, teacher, jnp.array([1], jnp.int32))
    np.testing.assert_allclose(metrics["student_nll"], [-np.log(0.75)], rtol=1e-6)
    np.testing.assert_allclose(metrics["teacher_nll"], [-np.log(0.5)], rtol=1e-6)


def test_comparison_excluded_entries_stay_finite():
    student = jnp.array([[0.0, 1.0, -jnp.inf]])
    teacher = jnp.array([[0.0, -jnp.inf, -jnp.inf]])
    assert np.isfinite(ev.Comparison()(student, teacher)).all()


def test_evaluate_weights_by_token_over_batches():
    mesh = make_mesh("data=1", jax.devices()[:1])

    def step(params, teacher_params, batch):
        weight = jnp.sum(batch["labels"] >= 0).astype(jnp.float32)
        return {
            "loss": 2.0 * weight,
            "weight": weight,
            "student_nll": jnp.log(3.0) * weight,
            "teacher_nll": jnp.float32(0.0),
        }

    batches = [
        {"labels": np.array([[1, 2, -100]], np.int32)},
        {"labels": np.array([[1, -100, -100]], np.int32)},
    ]
    found = ev.evaluate(step, {}, {}, batches, mesh)
    assert found.tokens == 3
    np.testing.assert_allclose(found[:3], [2.0, 3.0, 1.0], rtol=1e-6)  # float32


def test_evaluate_nothing_counted_is_an_error():
    mesh = make_mesh("data=1", jax.devices()[:1])
    with pytest.raises(ValueError, match="no counted token"):
        ev.evaluate(lambda *_: {}, {}, {}, [], mesh)
