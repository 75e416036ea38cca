import contextlib
import gc
import resource
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from taid_jax.settings import Settings, from_dict
from taid_jax.sharding import make_mesh, tree_shardings
from taid_jax.train import checkpoint as c
from taid_jax.train.folder import WriteError, step_folders


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
    store.save(3, state, {"epoch": 1, "next": [2, 5]}, settings, metric=0.5)
    store.close()
    again = c.Checkpoints(tmp_path / "checkpoints")
    _equal(again.restore(jax.tree.map(jnp.zeros_like, state), 3), state)
    place = {"epoch": 1, "next": [2, 5]}
    assert c.read_run(again.folder / "3") == (settings, place)
    again.close()


def test_checkpoints_keep_the_last_and_the_best(tmp_path, state):
    store = c.Checkpoints(tmp_path, keep=2)
    for step, cost in enumerate([3.0, 1.0, 2.0, None, 4.0]):
        store.save(step, state, {}, Settings(), metric=cost)
    store.wait()
    assert store.steps() == [1, 3, 4]
    assert store.latest_step() == 4
    store.close()


def test_checkpoints_best_is_remembered_by_a_resumed_run(tmp_path, state):
    store = c.Checkpoints(tmp_path, keep=2)
    for step, cost in enumerate([3.0, 1.0, 2.0]):
        store.save(step, state, {}, Settings(), metric=cost)
    store.close()
    again = c.Checkpoints(tmp_path, keep=2)
    for step, cost in ((3, 5.0), (4, None), (5, float("nan")), (6, 4.0)):
        again.save(step, state, {}, Settings(), metric=cost)
    again.wait()
    assert again.steps() == [1, 5, 6]
    again.close()


def test_checkpoints_keep_no_more_than_asked_where_nothing_was_judged(tmp_path, state):
    store = c.Checkpoints(tmp_path, keep=1)
    for step in range(4):
        store.save(step, state, {}, Settings())
    store.wait()
    assert store.steps() == [3]
    store.close()


@pytest.mark.multidevice
def test_checkpoints_move_to_other_meshes_and_device_counts(tmp_path, state):
    def axes(leaf):
        width = leaf.shape.index(8) if 8 in leaf.shape else None
        return tuple("embed" if axis == width else None for axis in range(leaf.ndim))

    def shapes_on(text, count):
        mesh = make_mesh(text, jax.devices()[:count])
        return jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            state,
            tree_shardings(jax.tree.map(axes, state), state, mesh),
        )

    there = jax.tree.map(lambda leaf: leaf.sharding, shapes_on("fsdp=4,data=2", 8))
    with c.Checkpoints(tmp_path) as store:
        store.save(1, jax.device_put(state, there), {}, Settings())
        store.wait()
        for text, count in (("data=2,fsdp=2", 4), ("data=1", 1)):
            wanted = shapes_on(text, count)
            found = store.restore(wanted, 1)
            _equal(found, state)
            for leaf, shape in zip(
                jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True
            ):
                assert leaf.sharding == shape.sharding


def test_checkpoints_half_written_one_is_not_seen(tmp_path, state):
    store = c.Checkpoints(tmp_path)
    store.save(1, state, {}, Settings())
    store.close()
    half = tmp_path / "2.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    (half / "piece").write_bytes(b"\0" * 100)
    again = c.Checkpoints(tmp_path)
    assert again.latest_step() == 1
    _equal(again.restore(state, 1), state)
    again.close()


def test_checkpoints_hold_the_student_side_only(tmp_path, state):
    store = c.Checkpoints(tmp_path)
    store.save(1, state, {}, Settings())
    store.close()
    (saved,) = (path for path in tmp_path.iterdir() if path.name == "1")
    folders = {path.name for path in saved.iterdir() if path.is_dir()}
    assert folders == {"state", "run", "metrics"}
    with ocp.StandardCheckpointer() as reader:
        found = reader.restore(saved / "state")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(found)) == size


def test_checkpoints_of_another_model_is_a_clear_error(tmp_path, state, make_params):
    store = c.Checkpoints(tmp_path)
    store.save(1, state, {}, Settings())
    store.wait()
    other = state._replace(params=make_params(1, width=6))
    with pytest.raises(c.CheckpointError, match="does not fit this model") as caught:
        store.restore(other, 1)
    line = r"params.lm_head.kernel: saved (8, 23), here (6, 23)"
    assert line in str(caught.value)
    store.close()


def test_checkpoints_wait_for_a_save_in_flight_whatever_ends_them(tmp_path, state):
    class StoppedError(BaseException):
        pass

    store = c.Checkpoints(tmp_path)

    def save():
        with store:
            store.save(1, state, {}, Settings())
            raise StoppedError

    with pytest.raises(StoppedError):
        save()
    assert c.find_fault(tmp_path / "1") is None
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    store.close()  # Once more is harmless.


@pytest.mark.parametrize("size", [0, 200, 2000])
def test_checkpoints_that_cannot_be_written_are_one_error(
    tmp_path, state, caplog, capfd, size
):
    with c.Checkpoints(tmp_path) as store:
        store.save(1, state, {}, Settings())
    store = c.Checkpoints(tmp_path)

    def save():
        store.save(2, state, {}, Settings())
        store.wait()

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(WriteError) as caught:
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = str(caught.value)
    assert text.startswith(f"checkpoint 2 cannot be written to {tmp_path}: ")
    assert text.endswith("File too large")
    assert not caplog.records
    with contextlib.suppress(WriteError):
        store.close()
    # TensorStore's other writes come back when nobody waits any more.
    late = RuntimeError("Event loop is closed")
    fields = {"exc_value": late, "object": None, "exc_type": RuntimeError}
    sys.unraisablehook(
        types.SimpleNamespace(**fields, exc_traceback=None, err_msg=None)
    )
    # What is half written is never taken for good.
    assert list(step_folders(tmp_path)) == [1]
    again = c.Checkpoints(tmp_path)
    assert again.steps() == [1]
    _equal(again.restore(state, 1), state)
    again.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Coroutines of TensorStore that never began.
        gc.collect()
    assert not capfd.readouterr().err


def test_checkpoints_restore_names_what_cannot_be_read(tmp_path, state):
    with c.Checkpoints(tmp_path) as store:
        store.save(1, state, {}, Settings())
        store.wait()
        (tmp_path / "1" / "state" / "manifest.ocdbt").write_bytes(b"x")
        with pytest.raises(c.CheckpointError, match=f"checkpoint 1 in {tmp_path}"):
            store.restore(state, 1)
