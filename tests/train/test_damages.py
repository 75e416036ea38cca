"""What is done to a run folder, and what a resumed run makes of it."""

import json
import os
import pathlib
import random
import re
import shutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.settings import from_dict
from taid_jax.train import checkpoint as c
from taid_jax.train import resume as rs
from taid_jax.train.folder import CHECKPOINTS, SET_ASIDE, RunFolder

STEPS = (3, 6, 9)
SETTINGS = {"steps": 12, "seed": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with three checkpoints, and the state of the first of them."""
    from taid_jax.train.state import DistillState

    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(9, 7)), "float32"), "b": jnp.ones(5)}
    state = DistillState(
        step=jnp.int32(0),
        params=params,
        opt_state=(jax.tree.map(jnp.zeros_like, params),),
        schedule=jnp.float32(0.25),
        learned=None,
    )
    folder = tmp_path_factory.mktemp("saved") / "run"
    with c.Checkpoints(folder / CHECKPOINTS, keep=3) as store:
        for step in STEPS:
            settings = from_dict(SETTINGS | {"output": str(folder)})
            store.save(
                step, _at(state, step), {"place": step}, settings, metric=float(step)
            )
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    return folder, state


def _at(state, step):
    params = jax.tree.map(lambda leaf: leaf + step, state.params)
    return state._replace(step=jnp.int32(step), params=params)


def _resume(folder, state, step=None):
    """Goes as far as a run does until it trains; returns what was restored."""
    output = RunFolder(from_dict({"output": str(folder), "resume": True}).run)
    try:
        output.check()
        output.claim()
        step = rs.choose_checkpoint(output, step)
        if step is None:
            return None, output.notes
        rs.set_aside_others(output, step)
        with c.Checkpoints(folder / CHECKPOINTS) as store:
            restored = store.restore(state, step)
        saved, place = c.read_run(folder / CHECKPOINTS / str(step))
        assert saved.run.seed == 4
        return Found(restored, place, step), output.notes
    finally:
        output.close()


class Found(typing.NamedTuple):
    state: typing.Any
    place: dict
    step: int


def _is_right(found, state):
    """Every bit is that of the step it says."""
    assert found.place == {"place": found.step}
    right = _at(state, found.step)
    for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path):
    path.write_bytes(b"")


def _lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def _make_folder(path):
    path.unlink()
    path.mkdir()


def _make_link_to_nothing(path):
    path.unlink()
    path.symlink_to("nowhere")


def _binary(path):
    path.write_bytes(random.Random(0).randbytes(500))


def _make_pipe(path):
    path.unlink()
    os.mkfifo(path)


EVERYWHERE = (_flip, _cut, _empty, _lengthen, pathlib.Path.unlink, _make_folder)


def test_find_fault_names_whatever_file_is_damaged(saved, tmp_path):
    folder, _ = saved
    place = tmp_path / "9"
    shutil.copytree(folder / CHECKPOINTS / "9", place)
    assert c.find_fault(place) is None
    names = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
    # Orbax writes this one last, and reads nothing from it.
    names.remove(pathlib.Path("commit_success.txt"))
    count = 0
    for name in names:
        for damage in (*EVERYWHERE, _make_link_to_nothing, _make_pipe, _binary):
            if name.name == "_CHECKPOINT_METADATA" and damage in (_flip, _lengthen):
                continue  # See below.
            damage(place / name)
            assert name.as_posix() in (c.find_fault(place) or ""), (name, damage)
            shutil.rmtree(place)
            shutil.copytree(folder / CHECKPOINTS / "9", place)
            count += 1
    assert count > 140


def test_find_fault_sees_files_that_were_swapped(saved, tmp_path):
    folder, _ = saved
    place = tmp_path / "9"
    shutil.copytree(folder / CHECKPOINTS / "9", place)
    data = sorted((place / "state" / "ocdbt.process_0" / "d").iterdir())
    one, other = data[0].read_bytes(), data[1].read_bytes()
    data[0].write_bytes(other)
    data[1].write_bytes(one)
    assert "bytes instead of" in (c.find_fault(place) or "")
    older = folder / CHECKPOINTS / "6" / "state" / "_METADATA"
    shutil.rmtree(place)
    shutil.copytree(folder / CHECKPOINTS / "9", place)
    shutil.copy(folder / CHECKPOINTS / "6" / "run" / "metadata", place / "run")
    assert "run/metadata" in (c.find_fault(place) or "")
    assert older.exists()


@pytest.fixture
def run(saved, tmp_path):
    """A copy of the run folder."""
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


def test_resume_of_what_orbax_says_of_a_checkpoint(saved, tmp_path):
    """What passes for sound gives the right bits all the same."""
    folder, state = saved
    chance, steps = random.Random(1), []
    for number in range(12):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        path = copy / CHECKPOINTS / "9" / "_CHECKPOINT_METADATA"
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        found, _ = _resume(copy, state)
        _is_right(found, state)
        steps.append(found.step)
    assert set(steps) == {6, 9}


def _array_of(step):
    def damage(run):
        data = run / CHECKPOINTS / str(step) / "state" / "ocdbt.process_0" / "d"
        _flip(max(data.iterdir(), key=lambda path: path.stat().st_size))

    return damage


def _all_of(*damages):
    return lambda run: [damage(run) for damage in damages]


def _foreign_names(run):
    for name in ("last", "9-copy", "007", "-1", "\u0669", "1e3", "9.old"):
        (run / CHECKPOINTS / name).mkdir()
    (run / CHECKPOINTS / "notes.txt").write_text("mine")


def _half_saved(run):
    half = run / CHECKPOINTS / "12.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    (half / "piece").write_bytes(b"\0" * 100)


def _step(name, damage):
    return lambda run: damage(run / CHECKPOINTS / name)


def _put(name, content=b"x"):
    return lambda run: (run / CHECKPOINTS / name).write_bytes(content)


def _copy(run, step, other):
    shutil.copytree(run / CHECKPOINTS / str(step), run / CHECKPOINTS / str(other))


def _replace_folder(path):
    shutil.rmtree(path)
    path.write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "step", "said"),
    [
        (_array_of(9), 6, r"9 is damaged: state/.* is altered; it is moved to"),
        (_all_of(_array_of(9), _array_of(6)), 3, "6 is damaged"),
        # An older one is no candidate for the best either.
        (_array_of(3), 9, "3 is damaged"),
        (_step("99", pathlib.Path.mkdir), 9, "99 is empty"),
        (_put("99"), 9, "99 is no folder"),
        (_put(str(1 << 70)), 9, "is no folder"),
        (_step("9", shutil.rmtree), 6, ""),
        (_step("9", _replace_folder), 6, "9 is no folder"),
        (_step("9/run", shutil.rmtree), 6, "run/.* is missing"),
        (_step("9/state", _replace_folder), 6, "state/"),
        (_step("9/digests.json", pathlib.Path.unlink), 6, "9 has no digests.json"),
        (_step("9/_CHECKPOINT_METADATA", _binary), 6, "_CHECKPOINT_METADATA"),
        (_step("9", lambda path: path.rename(path.with_name("11"))), 6, "11 is damag"),
        (lambda run: _copy(run, 9, 12), 9, "12 is damaged: .*another checkpoint's"),
        (_foreign_names, 9, ""),
        (_half_saved, 9, ""),
        (lambda run: _put("12")(run) or (run / "tensorboard").touch(), 9, "12 is no"),
        (lambda run: (run / "metrics.jsonl").mkdir(), 9, "metrics.jsonl is no file"),
        (lambda run: _make_folder(run / "settings.json"), 9, "settings.json is no"),
        (lambda run: (run / "report.json").mkdir(), 9, "report.json is no file"),
        (lambda run: os.mkfifo(run / "evaluations.jsonl"), 9, "evaluations.jsonl is"),
        (lambda run: (run / "student").write_text(""), 9, "student is no folder"),
    ],
)
def test_resume_goes_on_from_the_newest_sound_checkpoint(
    run, saved, damage, step, said
):
    damage(run)
    before = {path.stat().st_ino for path in run.rglob("*") if path.is_file()}
    found, notes = _resume(run, saved[1])
    assert found.step == step
    _is_right(found, saved[1])
    text = "\n".join(notes)
    assert re.search(said, text)
    newer = {path.name for path in (run / SET_ASIDE).glob("*")} - {"3"}
    moved = any(name.isdecimal() and int(name) > step for name in newer)
    assert (f"going on from checkpoint {step}" in text) == moved
    # Moved, and not deleted; a half-written checkpoint is nobody's.
    after = {path.stat().st_ino for path in run.rglob("*") if path.is_file()}
    assert before <= after or damage is _half_saved
    # Once more: it was put right.
    found, notes = _resume(run, saved[1])
    assert found.step == step
    assert not notes


def test_resume_of_no_sound_checkpoint_lists_all_and_the_way_out(run, saved):
    for step in STEPS:
        _array_of(step)(run)
    (run / CHECKPOINTS / "12").mkdir()
    with pytest.raises(c.CheckpointError, match="no checkpoint is sound") as caught:
        _resume(run, saved[1])
    text = str(caught.value)
    assert [f"{step} is damaged" in text for step in STEPS] == [True] * 3
    assert "12 is empty" in text
    assert "start anew" in text
    assert not (run / SET_ASIDE).exists()
    shutil.move(run / CHECKPOINTS, run.parent / "away")
    assert _resume(run, saved[1]) == (None, [])


def test_resume_step_chooses_one_and_keeps_the_newer_ones(run, saved):
    found, notes = _resume(run, saved[1], 3)
    _is_right(found, saved[1])
    assert found.step == 3
    assert sum("newer than the one that is asked for" in line for line in notes) == 2
    assert c.find_fault(run / SET_ASIDE / "9") is None
    shutil.move(run / SET_ASIDE / "9", run / CHECKPOINTS / "9")
    found, _ = _resume(run, saved[1], 3)
    assert sorted(path.name for path in (run / SET_ASIDE).iterdir()) == ["6", "9"]
    with pytest.raises(c.CheckpointError, match="has no checkpoint 9; there are 3"):
        _resume(run, saved[1], 9)


def test_resume_step_is_the_way_to_a_checkpoint_without_digests(run, saved):
    for step in STEPS:
        (run / CHECKPOINTS / str(step) / c.DIGESTS).unlink()
    with pytest.raises(c.CheckpointError, match="--resume-step N takes one without"):
        _resume(run, saved[1])
    found, notes = _resume(run, saved[1], 9)
    _is_right(found, saved[1])
    assert any("nothing tells whether it is sound" in line for line in notes)


def test_resume_step_refuses_a_damaged_checkpoint(run, saved):
    _array_of(6)(run)
    with pytest.raises(c.CheckpointError, match=r"6 is damaged: state/.* is altered"):
        _resume(run, saved[1], 6)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: None, None),
        (_empty, "settings.json: Expecting value"),
        (_binary, "settings.json"),
        (_make_folder, "settings.json is no file"),
        (_make_pipe, "settings.json is no file"),
        (lambda path: path.write_text("[" * 100_000), "settings.json"),
        (pathlib.Path.unlink, "settings.json"),
        (lambda path: path.write_text("[1]"), "settings.json"),
        (lambda path: path.write_text('{"steps": "many"}'), "steps: need int"),
        (lambda path: path.write_text('{"seed": 5}'), "has other settings than"),
    ],
)
def test_saved_settings_are_the_checkpoints_where_the_file_is_damaged(
    run, damage, said
):
    damage(run / "settings.json")
    found, fault = rs.saved_settings(run)
    assert found is not None
    assert (found.run.seed, found.run.steps) == (4, 12)
    assert re.search(said, fault or "") if said else fault is None


def test_saved_settings_longer_run_that_was_killed_before_it_saved(run):
    (run / "settings.json").write_text(json.dumps(SETTINGS | {"steps": 50}))
    found, fault = rs.saved_settings(run)
    assert found is not None
    assert found.run.steps == 50
    assert fault is None


def test_saved_settings_none_where_no_run_was(tmp_path):
    assert rs.saved_settings(tmp_path / "nowhere") == (None, None)
    assert rs.saved_settings(tmp_path) == (None, None)
