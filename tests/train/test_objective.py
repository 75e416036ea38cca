import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss
from taid_jax.settings import ObjectiveName, ObjectiveSettings, from_dict
from taid_jax.train.objective import make_objective, make_scheduler

NAMES = typing.get_args(ObjectiveName)


@pytest.mark.parametrize("name", NAMES)
def test_make_objective_every_name_has_a_loss_and_a_gradient(name):
    rng = np.random.default_rng(0)
    student, teacher = jnp.asarray(rng.normal(size=(2, 5, 11)), "float32")
    labels = jnp.arange(5, dtype=jnp.int32)
    for ratio in (1.0, 0.5) if name != "sft" else (1.0,):
        settings = ObjectiveSettings(objective=name, distil_ratio=ratio)
        make, learned = make_objective(settings)
        schedule = make_scheduler(settings, 10).init()
        objective = make(schedule, learned, jnp.int32(3))
        value, gradient = jax.value_and_grad(loss.distillation_loss, argnums=1)(
            objective, student, teacher, labels=labels
        )
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0
        mixed = isinstance(objective, loss.Mix)
        assert mixed == (ratio < 1)


def test_make_objective_settings_arrive():
    settings = from_dict(
        {
            "objective": "jensen_shannon",
            "teacher_weight": 0.3,
            "temperature": 2.0,
            "distil_ratio": 0.25,
        }
    ).objective
    make, _ = make_objective(settings)
    schedule = make_scheduler(settings, 10).init()
    objective = make(schedule, {}, jnp.int32(0))
    assert objective == loss.Mix(loss.JensenShannon(0.3, 2.0), 0.25)


def test_make_objective_taid_follows_the_schedule():
    settings = ObjectiveSettings(t_start=0.2)
    make, _ = make_objective(settings)
    schedule = make_scheduler(settings, 10).init()
    assert make(schedule, {}, jnp.int32(0)).t == np.float32(0.2)


def test_make_objective_ctkd_learns_its_temperature(
    make_trainer, make_params, make_batch
):
    settings = ObjectiveSettings(objective="ctkd", ctkd_ramp_steps=2)
    make, learned = make_objective(settings)
    step, state = make_trainer(make, learned=learned)
    for index in range(4):
        state, _ = step(state, make_params(2), make_batch(index))
    assert state.learned["raw_temperature"] != 1.0
    assert jax.tree.structure(state.learned) == jax.tree.structure(learned)
