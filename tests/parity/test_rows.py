import math

import pytest

from parity.rows import Deviation, Tally, Tolerance, failed, skipped

TOLERANCE = Tolerance(1e-3, "a test")


def _tally() -> Tally:
    return Tally("section", "name", "quantity", "other", TOLERANCE)


def test_tally_keeps_the_worst_case():
    tally = _tally()
    tally.add("small", 1e-5, 1e-6, 1e-7)
    tally.add("large", 5e-4, 1e-4, 4e-4)
    row = tally.row()
    assert row.passed
    assert (row.cases, row.error, row.error_exact) == (2, 5e-4, 1e-4)
    assert row.note == "worst: large"


@pytest.mark.parametrize(
    "errors",
    [
        (2e-3, None, None),
        (math.nan, None, None),
        (math.inf, None, None),
        (1e-5, math.nan, 1e-5),
        # Right beside the other side, wrong beside float64.
        (0.0, 2e-3, 2e-3),
        # Further from the other side than that side is from the truth.
        (2.5e-3, 1e-5, 1e-3),
    ],
)
def test_tally_fails_outside_the_tolerance(errors):
    tally = _tally()
    tally.add("fine", 0.0, 0.0, 0.0)
    tally.add("wrong", *errors)
    assert not tally.row().passed


def test_tally_forgives_the_other_sides_error_only():
    tally = _tally()
    tally.add("the other side is off", 0.5, 1e-5, 0.5)
    assert tally.row().passed


def test_tally_lets_a_drifting_quantity_drift_as_far_as_the_other_side():
    tally = Tally("section", "name", "quantity", "other", TOLERANCE, drifting=True)
    tally.add("both drift", 4e-3, 4e-3, 4e-3)
    assert tally.row().passed
    tally.add("only ours drifts", 4e-3, 4e-3, 1e-3)
    assert not tally.row().passed


def test_tally_without_cases_does_not_pass():
    assert not _tally().row().passed


def test_tally_refuses_a_case_that_compares_nothing():
    with pytest.raises(ValueError, match="compares nothing"):
        _tally().add("nothing", None, None, 1e-3)


def test_failed_leaves_out_what_was_not_run():
    assert failed([skipped("models", "a model", "not here")]) == []


def _deviation(published: float, ours: float) -> Deviation:
    return Deviation("", "", "", "", published, ours, 2.0, TOLERANCE, distance=0.01)


def test_deviation_needs_ours_right_and_the_published_one_wrong():
    assert _deviation(2.5, 2.0).passed
    assert _deviation(math.nan, 2.001).passed
    assert not _deviation(2.5, 2.01).passed
    assert not _deviation(2.5, math.nan).passed
    assert not _deviation(2.001, 2.0).passed
