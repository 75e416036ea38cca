"""The student of a run, scored by PyTorch: `python -m parity student`."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")

from parity.rows import failed  # noqa: E402
from parity.student import RunError, student_rows  # noqa: E402


def test_student_rows_agree_with_the_report(finished):
    rows = student_rows(finished)
    assert [row.quantity for row in rows] == [
        "weights",
        "logits",
        "held-out perplexity",
    ]
    assert failed(rows) == []


def test_student_rows_fail_for_another_report(finished, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(finished, other)
    report = json.loads((other / "report.json").read_text())
    report["student_perplexity_after"] *= 1.01
    (other / "report.json").write_text(json.dumps(report))
    assert [row.quantity for row in failed(student_rows(other))] == [
        "held-out perplexity"
    ]


def test_student_rows_name_a_folder_without_a_run(tmp_path):
    with pytest.raises(RunError, match="no finished run"):
        student_rows(tmp_path)
