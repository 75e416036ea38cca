import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.settings import Settings, from_dict
from taid_jax.train import checkpoint as c


@pytest.fixture
def state(make_trainer):
    return make_trainer()[1]


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_checkpoints_restore_gives_back_every_bit(tmp_path, state):
    settings = from_dict({"steps": 9, "seed": 4})
    store = c.Checkpoints(tmp_path / "checkpoints")
    state = state._replace(step=jnp.int32(3))
    store.save(3, state, {"epoch": 1, "next": [2, 5]}, settings, cost=0.5)
    store.close()
    again = c.Checkpoints(tmp_path / "checkpoints")
    found = again.restore(jax.tree.map(jnp.zeros_like, state))
    _equal(found.state, state)
    assert found.data_state == {"epoch": 1, "next": [2, 5]}
    assert found.step == 3
    assert again.settings() == settings
    again.close()


def test_checkpoints_keep_the_last_and_the_best(tmp_path, state):
    store = c.Checkpoints(tmp_path, keep=2)
    for step, cost in enumerate([3.0, 1.0, 2.0, None, 4.0]):
        store.save(step, state, {}, Settings(), cost=cost)
    store.wait()
    assert store.steps() == [1, 3, 4]
    assert store.latest_step() == 4
    store.close()


def test_checkpoints_half_written_one_is_not_seen(tmp_path, state):
    store = c.Checkpoints(tmp_path)
    store.save(1, state, {}, Settings())
    store.close()
    half = tmp_path / "2.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    (half / "piece").write_bytes(b"\0" * 100)
    again = c.Checkpoints(tmp_path)
    assert again.latest_step() == 1
    _equal(again.restore(state).state, state)
    again.close()


def test_checkpoints_none_is_a_clear_error(tmp_path, state):
    store = c.Checkpoints(tmp_path)
    with pytest.raises(c.CheckpointError, match="no checkpoint to go on from"):
        store.settings()
    with pytest.raises(c.CheckpointError, match="no checkpoint to go on from"):
        store.restore(state)
    store.close()


def test_checkpoints_of_another_model_is_a_clear_error(tmp_path, state, make_params):
    store = c.Checkpoints(tmp_path)
    store.save(1, state, {}, Settings())
    store.wait()
    other = state._replace(params=make_params(1, width=6))
    with pytest.raises(c.CheckpointError, match="does not fit this model") as caught:
        store.restore(other)
    line = r"params.lm_head.kernel: saved (8, 23), here (6, 23)"
    assert line in str(caught.value)
    store.close()
