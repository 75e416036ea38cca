import json
from math import inf, nan

import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.train import metrics as mt
from taid_jax.train import throughput as tp
from taid_jax.train.evaluate import HeldOut
from taid_jax.train.report import EVALUATIONS, METRICS, read_lines


@pytest.fixture
def open_logger(tmp_path, monkeypatch, told):
    """A loglogger of ten steps, and a clock that is set by hand."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(tp, "time", clock)
    loggers = []

    def make(start=0, every=1, progress=None, **options):
        throughput, progress = tp.Throughput(), progress or told()
        logger = mt.MetricsLogger(
            tmp_path,
            start=start,
            last=10,
            every=every,
            progress=progress,
            throughput=throughput,
            **options,
        )
        logger.told = progress.lines
        loggers.append(logger)
        return logger, clock, throughput

    yield make
    for logger in loggers:
        logger.close()


def row(step, found):
    return {"step": step, **found._asdict()}


def _metrics(loss=1.0, skipped=0.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(2), "skipped": skipped}


def test_loglogger_counts_tokens_of_the_time_that_is_not_paused(open_logger, tmp_path):
    logger, clock, throughput = open_logger(every=2)
    clock.now += 1
    logger.step(1, _metrics(), 30)
    with throughput.measured("save"):
        clock.now += 50
    clock.now += 2
    logger.step(2, _metrics(), 30)
    (found,) = read_lines(tmp_path / METRICS)
    assert found["step"] == 2
    assert found["tokens_per_second"] == 60 / 3


def test_loglogger_counts_skipped_steps_in_a_row(open_logger, tmp_path):
    # They are written whatever else is.
    logger, *_ = open_logger(every=3)
    counts = []
    for step, skipped in enumerate([1.0, 1.0, 0.0, 1.0], start=1):
        logger.step(step, _metrics(jnp.nan if skipped else 1.0, skipped), 8)
        counts.append(logger.skipped_in_row)
    assert counts == [1, 2, 0, 1]
    rows = read_lines(tmp_path / METRICS)
    assert [row["skipped"] for row in rows] == [True, True, False, True]
    np.testing.assert_equal([row["loss"] for row in rows], [nan, nan, 1.0, nan])


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [(nan, nan, "loss"), (1.0, inf, "gradient"), (1.0, 2.0, "update")],
)
def test_loglogger_tells_what_is_not_finite(
    open_logger, tmp_path, told, loss, grad_norm, reason
):
    shown = told()
    logger, *_ = open_logger(progress=shown)
    logger.step(1, _metrics(loss, 1.0) | {"grad_norm": jnp.float32(grad_norm)}, 8)
    assert f"the {reason} is not finite, step skipped (1 in a row)" in shown.lines[0]
    assert str(jnp.float32(loss)) in shown.lines[0]
    assert logger.not_finite == reason
    (found,) = read_lines(tmp_path / METRICS)
    assert found["not_finite"] == reason
    np.testing.assert_equal(found["grad_norm"], grad_norm)
    logger.step(2, _metrics(), 8)
    assert logger.not_finite is None


def test_loglogger_of_an_evaluation_that_is_not_finite(open_logger, tmp_path):
    logger, *_ = open_logger()
    logger.evaluation(row(1, HeldOut(nan, inf, 3.0, 4, nan)))
    (found,) = read_lines(tmp_path / EVALUATIONS)
    np.testing.assert_equal(found, logger.evaluations[0])


def test_loglogger_writes_the_last_step_always(open_logger, tmp_path):
    logger, *_ = open_logger(every=4)
    for step in range(1, 11):
        logger.step(step, _metrics(), 8)
    assert [row["step"] for row in read_lines(tmp_path / METRICS)] == [4, 8, 10]


def test_loglogger_resumed_drops_what_came_after_and_knows_what_came_before(
    open_logger, tmp_path
):
    logger, *_ = open_logger()
    for step in (2, 4):
        logger.step(step, _metrics(), 8)
        logger.evaluation(row(step, HeldOut(step / 10, 2, 3, 4)))
    logger.close()
    kept = logger.evaluations[:1]
    again, *_ = open_logger(start=3, evaluations=kept)
    assert [row["kl_teacher"] for row in again.evaluations] == [0.2]
    again.evaluation(row(5, HeldOut(0.5, 2, 3, 4)))
    assert [row["step"] for row in again.evaluations] == [2, 5]
    lines = (tmp_path / EVALUATIONS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 5]
    assert [row["step"] for row in read_lines(tmp_path / METRICS)] == [2]


@pytest.mark.parametrize("text", ["", "{", '{"step": 2, "kl_teacher": 9.0}\n'])
def test_loglogger_evaluations_are_those_of_the_checkpoint(open_logger, tmp_path, text):
    (tmp_path / EVALUATIONS).write_text(text)
    rows = [{"step": 2, "kl_teacher": 0.5}]
    logger, *_ = open_logger(start=3, evaluations=rows)
    assert logger.evaluations == read_lines(tmp_path / EVALUATIONS) == rows
    assert "evaluations.jsonl is not the checkpoint's" in logger.told[0]
    logger.close()
    again, *_ = open_logger(start=3, evaluations=rows)
    assert not again.told


def test_loglogger_of_a_new_run_begins_without_evaluations(open_logger, tmp_path):
    (tmp_path / EVALUATIONS).write_text('{"step": 0, "kl_teacher": 9.0}\n')
    logger, *_ = open_logger(evaluations=[])
    assert not logger.evaluations
    assert not (tmp_path / EVALUATIONS).read_text()


def test_loglogger_writes_events_that_tensorboard_reads(open_logger, tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="reads them with TensorBoard",
    )
    logger, *_ = open_logger()
    logger.step(1, _metrics(), 8)
    logger.evaluation(row(1, HeldOut(0.5, 2.0, 3.0, 4)))
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [event.value for event in found.Scalars("held_out/kl_teacher")] == [0.5]
    assert [event.step for event in found.Scalars("distill/loss")] == [1]
    for model, perplexity in (("student", 2.0), ("teacher", 3.0)):
        (event,) = found.Scalars(f"held_out/cross_entropy/{model}")
        assert event.value == pytest.approx(np.log(perplexity))  # float32
