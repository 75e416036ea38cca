import json
from math import inf, nan

import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.evaluate import HeldOut
from taid_jax.train import logbook, utilisation
from taid_jax.train.report import EVALUATIONS, METRICS, read_lines


@pytest.fixture
def open_book(tmp_path, monkeypatch, told):
    """A logbook of ten steps, and a clock that is set by hand."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(utilisation, "time", clock)
    books = []

    def make(start=0, every=1, progress=None):
        meter = utilisation.Meter()
        book = logbook.Logbook(
            tmp_path,
            start=start,
            last=10,
            every=every,
            progress=progress or told(),
            meter=meter,
        )
        books.append(book)
        return book, clock, meter

    yield make
    for book in books:
        book.close()


def _metrics(loss=1.0, skipped=0.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(2), "skipped": skipped}


def test_logbook_counts_tokens_of_the_time_that_is_not_paused(open_book, tmp_path):
    book, clock, meter = open_book(every=2)
    clock.now += 1
    book.step(1, _metrics(), 30)
    with meter.measured("save"):
        clock.now += 50
    clock.now += 2
    book.step(2, _metrics(), 30)
    (row,) = read_lines(tmp_path / METRICS)
    assert row["step"] == 2
    assert row["tokens_per_second"] == 60 / 3


def test_logbook_counts_skipped_steps_in_a_row(open_book, tmp_path):
    book, *_ = open_book()
    counts = []
    for step, skipped in enumerate([1.0, 1.0, 0.0, 1.0], start=1):
        book.step(step, _metrics(jnp.nan if skipped else 1.0, skipped), 8)
        counts.append(book.skipped_in_row)
    assert counts == [1, 2, 0, 1]
    rows = read_lines(tmp_path / METRICS)
    assert [row["skipped"] for row in rows] == [True, True, False, True]
    np.testing.assert_equal([row["loss"] for row in rows], [nan, nan, 1.0, nan])


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [(nan, nan, "loss"), (1.0, inf, "gradient"), (1.0, 2.0, "update")],
)
def test_logbook_tells_what_is_not_finite(
    open_book, tmp_path, told, loss, grad_norm, reason
):
    shown = told()
    book, *_ = open_book(progress=shown)
    book.step(1, _metrics(loss, 1.0) | {"grad_norm": jnp.float32(grad_norm)}, 8)
    assert f"the {reason} is not finite, step skipped (1 in a row)" in shown.lines[0]
    assert str(jnp.float32(loss)) in shown.lines[0]
    assert book.not_finite == reason
    (row,) = read_lines(tmp_path / METRICS)
    assert row["not_finite"] == reason
    np.testing.assert_equal(row["grad_norm"], grad_norm)
    book.step(2, _metrics(), 8)
    assert book.not_finite is None


def test_logbook_of_an_evaluation_that_is_not_finite(open_book, tmp_path):
    book, *_ = open_book()
    book.evaluation(1, HeldOut(nan, inf, 3.0, 4, nan))
    (row,) = read_lines(tmp_path / EVALUATIONS)
    np.testing.assert_equal(row, book.evaluations[0])


def test_logbook_writes_the_last_step_always(open_book, tmp_path):
    book, *_ = open_book(every=4)
    for step in range(1, 11):
        book.step(step, _metrics(), 8)
    assert [row["step"] for row in read_lines(tmp_path / METRICS)] == [4, 8, 10]


def test_logbook_resumed_drops_what_came_after_and_knows_what_came_before(
    open_book, tmp_path
):
    book, *_ = open_book()
    for step in (2, 4):
        book.step(step, _metrics(), 8)
        book.evaluation(step, HeldOut(step / 10, 2, 3, 4))
    book.close()
    again, *_ = open_book(start=3)
    assert [row["kl"] for row in again.evaluations] == [0.2]
    again.evaluation(5, HeldOut(0.5, 2, 3, 4))
    assert [row["step"] for row in again.evaluations] == [2, 5]
    lines = (tmp_path / EVALUATIONS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 5]
    assert [row["step"] for row in read_lines(tmp_path / METRICS)] == [2]
