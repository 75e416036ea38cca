import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss
from taid_jax.settings import ObjectiveName, ObjectiveSettings
from taid_jax.train.objective import make_objective, make_scheduler

WARM = {"temperature": 2.0}
OBJECTIVES = {
    "taid": ({"t_start": 0.2}, loss.TAID(np.float32(0.2))),
    "sft": ({}, loss.CrossEntropy()),
    "forward_kl": (WARM, loss.ForwardKL(2.0)),
    "reverse_kl": (WARM, loss.ReverseKL(2.0)),
    "jensen_shannon": (WARM | {"teacher_weight": 0.3}, loss.JensenShannon(0.3, 2.0)),
    "total_variation": ({}, loss.TotalVariation()),
    "skew_forward_kl": (WARM | {"skew": 0.2}, loss.SkewForwardKL(0.2, 2.0)),
    "skew_reverse_kl": (WARM | {"skew": 0.2}, loss.SkewReverseKL(0.2, 2.0)),
    "adaptive_kl": (WARM | {"head_threshold": 0.7}, loss.AdaptiveKL(0.7, 2.0)),
    "ctkd": (
        {"ctkd_ramp_steps": 10},
        loss.CTKD(loss.ctkd_temperature(np.float32(1)), np.float32(0.5)),
    ),
    "alpha_mixture": (
        {"t_start": 0.2, "mixture_shape": -1.5},
        loss.AlphaMixture(np.float32(0.2), -1.5),
    ),
    "alpha_beta": (
        WARM | {"alpha_beta_a": 0.3, "alpha_beta_b": 0.6},
        loss.AlphaBeta(0.3, 0.6, 2.0),
    ),
    "concrete_score": (
        WARM | {"score_weights": "teacher"},
        loss.ConcreteScore("teacher", 2.0),
    ),
    "entropy_gated": (WARM | {"entropy_threshold": 0.5}, loss.EntropyGated(0.5, 2.0)),
    "distillm2": (
        {"skew": 0.2},
        loss.ByText(loss.SkewForwardKL(0.2), loss.SkewReverseKL(0.2), np.float32(1.25)),
    ),
    "dkd": (WARM | {"dkd_alpha": 0.9, "dkd_beta": 0.4}, loss.DKD(0.9, 0.4, 2.0)),
}


@pytest.mark.parametrize("name", typing.get_args(ObjectiveName))
def test_make_objective_every_name_and_setting_arrives(name):
    values, objective = OBJECTIVES[name]
    for ratio in (1.0,) if name in ("sft", "distillm2") else (1.0, 0.25):
        chosen = ObjectiveSettings(objective=name, distil_ratio=ratio, **values)
        make, learned = make_objective(chosen, 20)
        found = make(make_scheduler(chosen, 10).init(), learned, jnp.int32(5))
        expected = loss.Mix(objective, ratio) if ratio < 1 else objective
        # Kind, settings, and the numbers that are traced.
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        leaves = jax.tree.leaves(found)
        np.testing.assert_allclose(leaves, jax.tree.leaves(expected), rtol=1e-6)


def test_make_objective_ctkd_learns_its_temperature(
    make_trainer, make_params, make_batch
):
    settings = ObjectiveSettings(objective="ctkd", ctkd_ramp_steps=2)
    make, learned = make_objective(settings, 20)
    step, state = make_trainer(make, learned=learned)
    for index in range(2):
        state, _ = step(state, make_params(2), make_batch(index))
    assert state.learned["raw_temperature"] != 1.0
    assert jax.tree.structure(state.learned) == jax.tree.structure(learned)
