"""The published rules, as a table of thresholds and random draws."""

import math

import pytest

from taid_jax.train.sampler_rules import (
    Plan,
    Threshold,
    plan_adaptive,
    plan_mixed,
)

DATA = Plan(answer=False, train_on="data")
FRESH = Plan(answer=True, train_on="answers")
OLD = Plan(answer=False, train_on="buffer")
GKD = Plan(answer=True, train_on="buffer")


@pytest.mark.parametrize(
    ("draw", "expected"), [(0.0, GKD), (0.49, GKD), (0.5, DATA), (0.51, DATA)]
)
def test_plan_mixed_is_the_table_of_gkd(draw, expected):
    assert plan_mixed(draw, 0.5) == expected


# Threshold a, progress p, draw r, and what is done when the buffer is full or is not.
# Fresh answers below a (1 - p); up to a from the buffer, or fresh when it is not full;
# the data from a on.
DISTILLM = [
    # a, p, r, full, not full
    (0.0, 0.0, 0.0, DATA, DATA),
    (0.0, 0.5, 0.3, DATA, DATA),
    (0.1, 0.0, 0.05, FRESH, FRESH),
    (0.1, 0.0, 0.1, DATA, DATA),
    (0.4, 0.0, 0.39, FRESH, FRESH),
    (0.4, 0.5, 0.0, FRESH, FRESH),
    (0.4, 0.5, 0.19, FRESH, FRESH),
    (0.4, 0.5, 0.2, OLD, FRESH),
    (0.4, 0.5, 0.39, OLD, FRESH),
    (0.4, 0.5, 0.4, DATA, DATA),
    (0.4, 0.5, 0.9, DATA, DATA),
    (1.0, 0.25, 0.74, FRESH, FRESH),
    (1.0, 0.25, 0.75, OLD, FRESH),
    (1.0, 0.25, 0.99, OLD, FRESH),
    (1.0, 1.0, 0.0, OLD, FRESH),
]


@pytest.mark.parametrize(("threshold", "progress", "draw", "full", "part"), DISTILLM)
def test_plan_adaptive_is_the_table_of_distillm(threshold, progress, draw, full, part):
    for expected, is_full in ((full, True), (part, False)):
        found = plan_adaptive(
            draw, threshold=threshold, progress=progress, full=is_full
        )
        assert found == expected


def test_threshold_follows_the_table_of_losses():
    # Loss that is found -> the threshold after it, and the loss that is stored.
    table = [
        (2.0, 0.0, 2.0),  # the first, before training, is stored
        (1.5, 0.0, 2.0),  # below: nothing changes, the stored one stays
        (1.9, 0.0, 2.0),  # above the last, but still below the stored one
        (2.0, 0.1, 2.0),  # equal counts as above
        (2.5, 0.2, 2.5),
        (2.4, 0.2, 2.5),
        (math.nan, 0.2, 2.5),
        (math.inf, 0.2, 2.5),
        (2.6, 0.3, 2.6),
    ]
    threshold = Threshold()
    for loss, value, stored in table:
        threshold = threshold.after(loss, 0.1)
        # Sums of 0.1 in float64.
        assert threshold.value == pytest.approx(value, abs=1e-12)
        assert threshold.loss == stored


def test_threshold_ends_at_one():
    threshold = Threshold(0.95, 1.0).after(1.0, 0.1)
    assert threshold.value == 1.0
    assert threshold.after(1.0, 0.1).value == 1.0


def test_threshold_without_a_number_stores_nothing():
    assert Threshold().after(math.nan, 0.1) == Threshold()
