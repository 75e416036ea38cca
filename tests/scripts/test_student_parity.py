"""The student of a run, scored by PyTorch: `python -m parity student`."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")

from parity.rows import failed  # noqa: E402
from parity.student import RunError, student_rows  # noqa: E402


@pytest.fixture(scope="module")
def run_folder(train_tpu, teacher, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "run"
    flags = [
        f"--teacher={teacher}",
        "--student-layers=2",
        f"--data={text}",
        f"--output={folder}",
        "--steps=2",
        "--batch-size=8",
        "--seq-len=16",
        "--eval-every=0",
        "--save-every=0",
        "--held-out-fraction=0.3",
    ]
    assert train_tpu.main(flags) == 0
    return folder


def test_student_rows_agree_with_the_report(run_folder):
    rows = student_rows(run_folder)
    assert [row.quantity for row in rows] == [
        "weights",
        "logits",
        "held-out perplexity",
    ]
    assert failed(rows) == []


def test_student_rows_fail_for_another_report(run_folder, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run_folder, other)
    report = json.loads((other / "report.json").read_text())
    report["student_perplexity_after"] *= 1.01
    (other / "report.json").write_text(json.dumps(report))
    assert [row.quantity for row in failed(student_rows(other))] == [
        "held-out perplexity"
    ]


def test_student_rows_name_a_folder_without_a_run(tmp_path):
    with pytest.raises(RunError, match="no finished run"):
        student_rows(tmp_path)
