import io
import json
import math

import numpy as np
from rich.console import Console

from parity.rows import Deviation, Tally, Tolerance, skipped
from parity.table import markdown, print_rows, write_report

WHY = "because a sum of ten terms rounds ten times"


def _rows():
    good = Tally("losses", "TAID", "float32 value", "PyTorch", Tolerance(1e-5, WHY))
    good.add("first", np.float64(1e-6), np.float32(2e-6), 3e-6)
    bad = Tally("losses", "JS", "float32 value", "PyTorch", Tolerance(1e-5, WHY))
    bad.add("first", math.nan, math.nan, 0.0)
    return [
        good.row(),
        bad.row(),
        skipped("models", "a large model", "not here"),
        Deviation(
            "NaN ends it",
            "goes on",
            "t",
            "reference",
            math.nan,
            0.5,
            0.5,
            Tolerance(1e-6, "absolute"),
            0.01,
        ),
    ]


def test_print_rows_shows_errors_verdicts_and_reasons():
    out = io.StringIO()
    print_rows(_rows(), Console(file=out, width=200))
    text = out.getvalue()
    for part in ("TAID", "1.0e-06", "pass", "FAIL", "not run", "nan", WHY, "not here"):
        assert part in text
    assert text.count(WHY) == 1


def test_markdown_has_a_table_per_section_with_equal_columns():
    text = markdown(_rows())
    for section in ("losses", "models", "deviations"):
        assert f"#### {section}" in text
    for block in text.split("####")[1:]:
        widths = {
            line.count("|") for line in block.splitlines() if line.startswith("|")
        }
        assert len(widths) == 1
    assert "FAIL" in text
    assert WHY in text


def test_write_report_keeps_every_number_in_plain_json(tmp_path):
    path = tmp_path / "new" / "report.json"
    write_report(_rows(), path, {"jax": "1"})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    report = json.loads(path.read_text(), parse_constant=refuse)
    assert report["passed"] is False
    assert report["versions"] == {"jax": "1"}
    first, second, *_ = report["rows"]
    assert (first["error"], first["passed"]) == (1e-6, True)
    assert (second["error"], second["passed"]) == ("nan", False)
    assert first["tolerance"] == {"value": 1e-5, "why": WHY}
