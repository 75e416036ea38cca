import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.errors import ModelError
from taid_jax.settings import from_dict
from taid_jax.sharding import make_mesh, replicated
from taid_jax.train import loop as lp
from taid_jax.train.checkpoint import Checkpoints, read_run
from taid_jax.train.evaluate import HeldOut
from taid_jax.train.metrics import LOGGED
from taid_jax.train.report import read_lines
from taid_jax.train.run import best_state, summary
from taid_jax.train.throughput import MEASURED


class Batches:
    """Batches by number, whose place is that number."""

    def __init__(self, make_batch):
        self.make_batch, self.index = make_batch, 0

    def __next__(self):
        self.index += 1
        return self.make_batch(self.index)

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


@pytest.fixture
def make_loop(tmp_path, make_trainer, make_params, make_batch, told):
    def make(*, teacher=None, evaluate=None, resume=False, folder="run", **values):
        settings = from_dict({"steps": 12, "eval_every": 4, "save_every": 3} | values)
        folder = tmp_path / folder
        folder.mkdir(exist_ok=True)
        mesh = make_mesh("data=1", jax.devices()[:1])
        step, state = make_trainer(steps=12)
        state = jax.device_put(state, replicated(mesh))
        loop = lp.Loop(
            settings=settings,
            folder=folder,
            train_step=step,
            teacher_params=make_params(2) if teacher is None else teacher,
            batches=Batches(make_batch),
            fingerprint="abc",
            evaluate=evaluate
            or (
                lambda state: HeldOut(float(state.params["mix"]["bias"].sum()), 2, 3, 4)
            ),
            checkpoints=Checkpoints(folder / "checkpoints"),
            mesh=mesh,
            progress=told(),
        )
        if resume:
            step = loop.checkpoints.latest_step()
            state = loop.checkpoints.restore(state, step)
            place = read_run(loop.checkpoints.folder / str(step)).place
            loop.batches.set_state(place["iterator"])
            loop.evaluations = place["evaluations"]
        return loop, state

    return make


def _rows(loop):
    """Metrics without what depends on the clock."""
    rows = read_lines(loop.folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def test_loop_logs_evaluates_and_saves(make_loop):
    loop, state = make_loop()
    state = loop.run(state)
    assert int(state.step) == 12
    rows = read_lines(loop.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    wanted = {*LOGGED, "step", "tokens_per_second"}
    assert all(wanted <= row.keys() for row in rows)
    assert all(isinstance(row["kl_teacher"], float) for row in rows)
    evaluated = read_lines(loop.folder / "evaluations.jsonl")
    assert [row["step"] for row in evaluated] == [0, 4, 8, 12]
    assert loop.checkpoints.latest_step() == 12
    assert list((loop.folder / "tensorboard").iterdir())
    assert loop.progress.evaluations == [0, 4, 8, 12]


def test_loop_logs_every_so_often_and_the_last(make_loop):
    loop, state = make_loop(log_every=5)
    loop.run(state)
    assert [row["step"] for row in _rows(loop)] == [5, 10, 12]


def test_loop_resumed_continues_bit_for_bit(make_loop):
    whole, state = make_loop(folder="whole")
    expected = whole.run(state)

    class KilledError(Exception):
        pass

    calls = []

    def evaluate(state):
        calls.append(1)
        if len(calls) == 3:  # at step 8, after the checkpoint of step 6
            raise KilledError
        return HeldOut(float(state.params["mix"]["bias"].sum()), 2, 3, 4)

    cut, state = make_loop(evaluate=evaluate, folder="cut")
    with pytest.raises(KilledError):
        cut.run(state)
    cut.checkpoints.close()
    again, state = make_loop(resume=True, folder="cut")
    assert int(state.step) == 6
    found = again.run(state)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
    assert _rows(again) == _rows(whole)
    for name in ("evaluations.jsonl",):
        assert (again.folder / name).read_text() == (whole.folder / name).read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_loop_signal_saves_and_can_go_on(make_loop, number):
    sent = []

    def evaluate(state):
        if len(sent) == 1:  # at step 4, which is not a step that is saved anyway
            os.kill(os.getpid(), number)
        sent.append(1)
        return HeldOut(1.0, 2, 3, 4)

    loop, state = make_loop(evaluate=evaluate, save_every=0)
    before = signal.getsignal(number)
    with pytest.raises(
        lp.Interrupted, match=f"{signal.Signals(number).name}.*--resume"
    ):
        loop.run(state)
    assert signal.getsignal(number) is before
    assert loop.checkpoints.latest_step() in (4, 5)
    assert _rows(loop)[-1]["step"] == loop.checkpoints.latest_step()
    loop.checkpoints.close()
    again, state = make_loop(resume=True)
    assert int(again.run(state).step) == 12


def test_loop_stops_after_too_many_steps_that_are_not_finite(make_loop, make_params):
    teacher = jax.tree.map(lambda leaf: leaf * np.nan, make_params(2))
    loop, state = make_loop(teacher=teacher, max_consecutive_nonfinite=3, eval_every=0)
    with pytest.raises(lp.TrainingError, match=r"step 3: 3 steps in a row"):
        loop.run(state)
    assert len(loop.progress.lines) == 3
    rows = [
        json.loads(line)
        for line in (loop.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[0]["loss"] == "NaN"
    assert rows[0]["skipped"] is True
    assert rows[0]["not_finite"] == "loss"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            HeldOut(math.nan, 2.0, math.nan, 4, 1.0),
            "the teacher: not finite .*kl_teacher nan",
        ),
        (HeldOut(math.nan, math.nan, 3.0, 4, 1.0), "the student: not finite"),
        (HeldOut(math.nan, math.nan, math.nan, 4, 1.0), "the teacher and the student"),
        (HeldOut(1.0, 2.0, 3.0, 4, math.inf), r"the two models .*\(loss inf\)"),
    ],
)
def test_loop_refuses_models_that_are_not_finite_at_the_start(
    make_loop, found, message
):
    loop, state = make_loop(evaluate=lambda state: found)
    with pytest.raises(ModelError, match=message):
        loop.run(state)
    # A second start finds nothing that it could take for an evaluation.
    assert not read_lines(loop.folder / "evaluations.jsonl")
    assert loop.checkpoints.latest_step() is None


def test_loop_refuses_a_student_with_a_weight_that_is_not_finite(make_loop):
    loop, state = make_loop(evaluate=lambda state: HeldOut(1.0, 2.0, 3.0, 4, 1.0))
    # No figure shows it: the bias of a unit that nothing comes from.
    bias = state.params["mix"]["bias"].at[2].set(math.nan)
    state.params["mix"]["bias"] = bias
    with pytest.raises(ModelError, match=r"the student .*not finite.*mix\.bias"):
        loop.run(state)


def test_loop_perplexity_beyond_a_float_is_no_fault(make_loop):
    loop, state = make_loop(
        evaluate=lambda state: HeldOut(1.0, math.inf, math.inf, 4, 1.0)
    )
    state = loop.run(state)
    found = HeldOut(1.0, math.inf, math.inf, 4, 1.0)
    assert best_state(loop, state)[1] == {"step": 12, **found._asdict()}


@pytest.mark.parametrize("selection_metric", ["kl_teacher", "rouge_l"])
def test_best_state_that_is_not_finite_is_an_error(make_loop, selection_metric):
    """What is not finite is never the best, whatever its answers score."""
    figures = iter([1.0, math.nan, math.inf, math.nan])
    loop, state = make_loop(
        evaluate=lambda state: HeldOut(next(figures), 2.0, 3.0, 4, 1.0, 0.5, 0.5),
        selection_metric=selection_metric,
        eval_prompts=1,
    )
    state = loop.run(state)
    with pytest.raises(lp.TrainingError, match=r"nothing was exported.*checkpoint is"):
        best_state(loop, state)


def test_best_state_with_weights_that_are_not_finite_is_an_error(make_loop):
    loop, state = make_loop(evaluate=lambda state: HeldOut(1.0, 2.0, 3.0, 4, 1.0))
    state = loop.run(state)
    state.params["mix"]["bias"] = state.params["mix"]["bias"].at[0].set(math.inf)
    with pytest.raises(lp.TrainingError, match="nothing was exported"):
        best_state(loop, state)


def test_loop_stops_when_no_update_is_finite(make_loop):
    loop, state = make_loop(max_consecutive_nonfinite=3, eval_every=0)
    step = loop.train_step

    def skipping(*arguments):
        state, metrics = step(*arguments)
        return state, metrics | {"skipped": jnp.float32(1)}

    loop.train_step = skipping
    with pytest.raises(lp.TrainingError, match=r"the last one its update.*--b2"):
        loop.run(state)
    assert len(loop.progress.lines) == 3
    assert "the update is not finite" in loop.progress.lines[0]


def test_loop_state_that_is_not_finite_is_no_checkpoint(make_loop):
    loop, state = make_loop(max_consecutive_nonfinite=6, eval_every=0)
    real = loop.train_step

    def step(state, teacher, batch):
        state, metrics = real(state, teacher, batch)
        params = jax.tree.map(
            lambda leaf: jnp.where(state.step > 4, leaf * np.nan, leaf), state.params
        )
        return state._replace(params=params), metrics

    loop.train_step = step
    with pytest.raises(lp.TrainingError, match="The last good checkpoint is 3 in"):
        loop.run(state)
    assert loop.checkpoints.steps() == [3]
    assert any("no checkpoint is made" in line for line in loop.progress.lines)


def test_loop_checkpoint_holds_evaluations_and_models(make_loop):
    loop, state = make_loop()
    loop.models = {"the teacher's weights": "abc"}
    state = loop.run(state)
    place = read_run(loop.checkpoints.folder / "12").place
    assert place["evaluations"] == read_lines(loop.folder / "evaluations.jsonl")
    assert place["models"] == loop.models


def test_best_state_is_not_a_damaged_checkpoint(make_loop):
    loop, state = make_loop(
        evaluate=_judged("kl_teacher", [0.5, 1.0, 2.0, 3.0]), keep=3
    )
    state = loop.run(state)
    path = loop.checkpoints.folder / "4" / "state" / "manifest.ocdbt"
    path.write_bytes(path.read_bytes()[:-1])
    state, found = best_state(loop, state)
    assert found["kl_teacher"] == 3.0
    assert int(state.step) == 12
    assert "is damaged: state/manifest.ocdbt" in loop.progress.lines[-1]


def test_loop_best_is_kept_although_older(make_loop):
    found = iter([5.0, 1.0, 3.0, 2.0])
    loop, state = make_loop(
        evaluate=lambda state: HeldOut(next(found), 2, 3, 4), keep=1
    )
    loop.run(state)
    kept = loop.checkpoints.steps()
    assert {4, 12} <= set(kept)
    assert not {3, 6, 8} & set(kept)


def _judged(field, values):
    """An evaluation that finds these values of one figure, one after the other."""
    left = iter(values)
    fixed = {"kl_teacher": 1.0, "student_perplexity": 2.0, "teacher_perplexity": 3.0}
    return lambda state: HeldOut(**{**fixed, "tokens": 4, field: next(left)})


@pytest.mark.parametrize(
    ("selection_metric", "values", "best"),
    [
        # Step 0, which is not trained, has the best figure of all.
        ("kl_teacher", [0.5, 3.0, 1.0, 2.0], 8),
        ("loss", [0.5, 3.0, 1.0, 2.0], 8),
        ("student_perplexity", [0.5, 3.0, 1.0, 2.0], 8),
        ("rouge_l", [0.9, 0.1, 0.3, 0.2], 8),
        ("exact_match", [0.9, 0.3, 0.1, 0.2], 4),
        # Nothing is exact: the last of equals.
        ("exact_match", [0.0, 0.0, 0.0, 0.0], 12),
        ("kl_teacher", [0.5, float("nan"), 1.0, float("inf")], 8),
    ],
)
def test_best_state_is_the_best_by_the_asked_figure(
    make_loop, selection_metric, values, best
):
    loop, state = make_loop(
        evaluate=_judged(selection_metric, values),
        selection_metric=selection_metric,
        eval_prompts=1,
        keep=1,
        save_every=0,
    )
    state = loop.run(state)
    weights = jax.tree.map(np.array, state.params)
    state, found = best_state(loop, state)
    assert int(state.step) == best
    assert found[selection_metric] == values[best // 4]
    assert found["step"] == best
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(weights), jax.tree.leaves(state.params), strict=True
        )
    ]
    assert any(changed) == (best != 12)


def test_loop_reads_metrics_after_the_next_step_was_handed_over(make_loop, monkeypatch):
    events = []
    loop, state = make_loop(eval_every=0, save_every=0)
    step, read = loop.train_step, jax.device_get

    def noted(*arguments):
        events.append("handed over")
        return step(*arguments)

    def device_get(values):
        events.append("read")
        return read(values)

    loop.train_step = noted
    monkeypatch.setattr(jax, "device_get", device_get)
    loop.run(state)
    # What is read before the first step is the start's evaluation.
    first = events.index("handed over")
    wanted = ["handed over", "handed over", "read", "handed over"]
    assert events[first : first + 4] == wanted
    assert events.count("handed over") == 12


def test_loop_seconds_of_saving_are_told(make_loop):
    loop, state = make_loop(eval_every=0, save_every=5)
    loop.run(state)
    rows = read_lines(loop.folder / "metrics.jsonl")
    # In the line after the save.
    assert [row["step"] for row in rows if row["save_seconds"] > 0] == [6, 11]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signals_notes_the_first_and_lets_the_second_through(number):
    came = []
    before = signal.signal(number, lambda *_: came.append("before"))
    try:
        with lp.stop_signals() as signals:
            assert signals.asked(1) is None
            os.kill(os.getpid(), number)
            assert signals.asked(2) == signal.Signals(number).name
            assert not came
            os.kill(os.getpid(), number)
            assert came == ["before"]
        os.kill(os.getpid(), number)
        assert came == ["before", "before"]
    finally:
        signal.signal(number, before)


def test_summary_has_the_figures_that_rows_have():
    """Those of an evaluation before a figure was added lack it."""
    old = {"kl_teacher": 2.0, "student_perplexity": 9.0, "teacher_perplexity": 3.0}
    found = HeldOut(1.0, 8.0, 3.0, 4, kl_reverse=0.5)
    report = summary([old], found._asdict())
    assert report["kl_before"] == 2
    assert report["kl_reverse_after"] == 0.5
    assert "kl_reverse_before" not in report
    assert "calibration_error_after" not in report
