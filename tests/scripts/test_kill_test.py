import importlib.util
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kill_test():
    """The script as a module."""
    path = ROOT / "benchmarks" / "kill_test.py"
    spec = importlib.util.spec_from_file_location("kill_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_kill_test_leaves_what_is_there_alone(kill_test, tmp_path, capsys):
    assert kill_test.main([f"--output={tmp_path}"]) == 2
    assert "choose another --output" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_test_finds_no_difference_and_would_find_one(
    kill_test, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "out"
    flags = ["--times=2", "--steps=24", f"--output={folder}"]
    assert kill_test.main(flags) == 0
    seen = json.loads((folder / "kill_test.json").read_text())
    assert seen["kills"] == 2
    assert seen["resumed_last_at"] > 0
    path = folder / "killed" / "metrics.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:-1], rows[-1].replace("0", "1")]) + "\n")
    found = kill_test.differences(folder / "whole", folder / "killed", 24)
    assert found == ["metrics.jsonl"]
