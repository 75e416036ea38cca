import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def _command(folder, *flags):
    script = ROOT / "benchmarks" / "check_device.py"
    small = ("--platform=cpu", "--small", f"--output={folder}")
    return [sys.executable, str(script), *small, *flags]


def _report(folder):
    return json.loads((folder / "check_device.json").read_text())


@pytest.fixture
def run_rows(capsys):
    """A function: the status and the note of a row."""
    path = ROOT / "benchmarks" / "device" / "rows.py"
    spec = importlib.util.spec_from_file_location("rows", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(compute):
        module.run_rows([("one", compute)])
        planned, row = (
            json.loads(line.removeprefix(module.MARK))
            for line in capsys.readouterr().out.splitlines()
        )
        assert planned == {"planned": ["one"]}
        return row["status"], row.get("note")

    return run


def test_run_rows_passes_what_is_not_above_its_limit(run_rows):
    for error, status in ((0.5, "pass"), (2.0, "fail"), (float("nan"), "fail")):
        assert run_rows(lambda: {"error": error, "limit": 1.0}) == (status, None)  # noqa: B023
    assert run_rows(lambda: {"ms": 1.0}) == ("measured", None)


def test_run_rows_tells_why_a_row_has_no_figures(run_rows):
    assert run_rows(lambda: 1 / 0) == ("error", "ZeroDivisionError: division by zero")
    status, note = run_rows(lambda: __import__("not_there"))
    assert (status, note) == ("skipped", "No module named 'not_there'")


def test_check_device_fails_when_section_a_is_not_reached(tmp_path):
    done = subprocess.run(
        _command(tmp_path, "--only=A,E", "--patience=1e-5"), capture_output=True
    )
    assert done.returncode == 1, done.stderr
    (a, e) = _report(tmp_path)["rows"]
    assert (a["status"], a["note"]) == (
        "not reached",
        "ended after 0 s; see check_device.log",
    )
    assert (a["section"], e["section"]) == ("A", "E")
    assert "not reached" in (tmp_path / "check_device.md").read_text()


def test_check_device_refuses_large_shapes_on_a_cpu(tmp_path):
    command = [flag for flag in _command(tmp_path, "--only=A") if flag != "--small"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "JAX has a CPU alone, for which there is --small" in done.stderr


@pytest.mark.slow
def test_check_device_keeps_rows_when_it_is_killed(tmp_path):
    command = _command(tmp_path, "--only=A", "--patience=20")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "entries: pass" in line:
                break
        process.send_signal(signal.SIGKILL)
    (row, *_) = _report(tmp_path)["rows"]
    assert row["status"] == "pass"
    assert row["row"] in (tmp_path / "check_device.md").read_text()


@pytest.mark.slow
def test_check_device_measures_every_section_on_a_cpu(tmp_path):
    pytest.importorskip("torch", reason="compares with PyTorch: '.[parity]'")
    # XLA's own rounding, as on a device: nothing of it switched off.
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    # Two idle cores need a tenth of these limits.
    command = _command(tmp_path, "--patience=20")
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    report = _report(tmp_path)
    sections = {name: [] for name in "ABCDE"}
    for row in report["rows"]:
        sections[row["section"]].append(row)
    assert {row["status"] for row in sections["A"]} == {"pass"}
    assert all(0 <= row["error"] <= row["limit"] for row in sections["A"])
    for name in "BCD":
        for row in sections[name]:
            if row["row"].startswith("Liger"):
                assert row["note"] == "Liger needs a GPU"
            elif row["row"].startswith("torch.compile") and not shutil.which("g++"):
                assert row["status"] == "error"
            elif row["row"].startswith("parts"):
                assert row["head_ms"] > 0
            else:
                assert row["ms"] > 0, row
                assert name == "B" or row["tokens_per_second"] > 0
    assert {row["note"] for row in sections["E"]} == {"no time for it: give --minutes"}
    figures = {goal["goal"].split(":")[0]: goal["figure"] for goal in report["goals"]}
    assert figures["head, float32"] > 0
    assert report["about"]["platform"] == "cpu"
