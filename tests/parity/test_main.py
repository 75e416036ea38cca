import importlib.util
import json

import pytest

from parity import __main__ as cli

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="parity needs PyTorch: '.[parity]'",
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(tmp_path)


def test_main_says_in_one_line_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["losses"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'taid-jax[parity]'" in line


def test_main_refuses_an_unknown_section(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["looses"])
    assert "looses" in capsys.readouterr().err


@needs_torch
def test_main_names_a_golden_folder_that_is_not_there(tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    assert cli.main(["schedule", "--golden", str(nowhere)]) == 2
    assert str(nowhere / "schedule.npz") in capsys.readouterr().err


@needs_torch
def test_main_names_a_checkout_that_is_none(tmp_path, capsys):
    assert cli.main(["schedule", "--upstream", str(tmp_path)]) == 2
    assert "distil_losses" in capsys.readouterr().err


@needs_torch
def test_main_prints_and_writes_one_section(tmp_path, capsys):
    report, table = tmp_path / "r.json", tmp_path / "t.md"
    arguments = ["schedule", "--seeds", "0", "--report", str(report)]
    assert cli.main([*arguments, "--markdown", str(table)]) == 0
    shown = capsys.readouterr().out
    assert "parity: schedule" in shown
    assert "0 fail" in shown
    rows = json.loads(report.read_text())["rows"]
    assert {row["other"] for row in rows} == {"recording"}
    assert "#### schedule" in table.read_text()


@needs_torch
def test_main_fails_when_a_row_fails_and_writes_the_report(monkeypatch, tmp_path):
    from parity import sections
    from parity.rows import Tally, Tolerance

    def wrong(options):
        assert options.seeds == 3
        tally = Tally("any", "name", "value", "other", Tolerance(0.0, "none"))
        tally.add("case", 1.0)
        return [tally.row()]

    monkeypatch.setattr(sections, "SECTIONS", dict.fromkeys(cli.NAMES, wrong))
    assert cli.main(["--seeds", "3"]) == 1
    report = json.loads((tmp_path / cli.REPORT).read_text())
    assert report["passed"] is False
    assert len(report["rows"]) == len(cli.NAMES)
    assert {"jax", "torch", "python"} <= set(report["versions"])
