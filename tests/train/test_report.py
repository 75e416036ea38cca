import json
import math

import numpy as np
import pytest

from taid_jax.train import report


def test_lines_cuts_back_to_where_a_resumed_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    lines = report.Lines(path, first_dropped=3)
    lines.write({"step": 3, "loss": 0.5})
    lines.close()
    assert report.read_lines(path) == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": 0.5},
    ]


ODD = {"step": 1, "loss": math.nan, "kl": math.inf, "t": -math.inf, "lr": None}


def test_lines_not_finite_is_a_word_and_read_back_a_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = report.Lines(path, first_dropped=0)
    lines.write(ODD | {"skipped": True})
    lines.close()
    written = json.loads(path.read_text(), parse_constant=_refuse)
    assert written == {
        "step": 1,
        "loss": "NaN",
        "kl": "Infinity",
        "t": "-Infinity",
        "lr": None,
        "skipped": True,
    }
    (row,) = report.read_lines(path)
    np.testing.assert_equal(row, ODD | {"skipped": True})
    # A resumed run writes what it keeps anew.
    report.Lines(path, first_dropped=2).close()
    assert json.loads(path.read_text(), parse_constant=_refuse) == written


def _refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_write_json_is_strict_json_and_read_back(tmp_path):
    path = tmp_path / "report.json"
    values = ODD | {"settings": {"run": {"epochs": math.inf, "name": "Nan"}}}
    report.write_json(path, values)
    written = json.loads(path.read_text(), parse_constant=_refuse)
    assert written["loss"] == "NaN"
    assert written["settings"]["run"]["epochs"] == "Infinity"
    np.testing.assert_equal(report.read_json(path), values)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (None, "-"),
        (1, "1.0"),
    ],
)
def test_number_prints_what_is_there(value, text):
    assert report.number(value, 1) == text


def test_draw_curves_makes_a_picture(tmp_path):
    path = tmp_path / "curves.png"
    rows = [{"step": i, "loss": 1 / i, "kl": 1 / i, "t": 0.1 * i} for i in range(1, 9)]
    rows[3]["kl"], rows[4]["loss"], rows[5]["kl"] = None, math.nan, math.inf
    judged = [{"step": 0, "kl": 2.0}, {"step": 4, "kl": None}, {"step": 8, "kl": 0.2}]
    report.draw_curves(path, rows, judged, title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_draw_curves_of_nothing_finite_makes_a_picture(tmp_path, value):
    path = tmp_path / "curves.png"
    rows = [{"step": i, "loss": value, "kl": value, "t": value} for i in range(3)]
    report.draw_curves(path, rows, rows, title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")
