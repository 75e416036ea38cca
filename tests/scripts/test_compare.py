import json
import pathlib
import subprocess

import numpy as np
import pytest
import yaml

from taid_jax.cli.compare import METHODS


@pytest.fixture(scope="session")
def compare(load_script):
    return load_script("compare")


@pytest.fixture
def shared(teacher, questions, tmp_path):
    """Flags of a comparison of a few seconds per cell, and its output folder."""
    values = {
        "teacher": str(teacher),
        "student_layers": 2,
        "data": {"data": str(questions), "held_out_fraction": 0.3},
        "batch_size": 8,
        "seq_len": 40,
        "pack": False,
        "steps": 3,
        "eval_every": 2,
        "save_every": 0,
        "learning_rate": 0.01,
        "eval_prompts": 4,
        "eval_tokens": 6,
        "completion_tokens": 6,
        "buffer_capacity": 16,
    }
    path = tmp_path / "shared.yaml"
    path.write_text(yaml.safe_dump(values))
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "rkl.yaml").write_text("objective: reverse_kl\n")
    (folder / "taid.yaml").write_text("objective: taid\n")
    output = tmp_path / "out"
    return [f"--config={path}", f"--output={output}"], output


@pytest.fixture
def started(compare, train_tpu, monkeypatch):
    """Runs cells in this process; the list of what was started."""
    calls = []

    def run(command, **options):
        calls.append(command[4:])
        status = train_tpu.main(command[4:])
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(compare.subprocess, "run", run)
    return calls


def test_compare_makes_the_table_and_runs_no_cell_twice(
    compare, shared, started, capsys
):
    flags, output = shared
    assert compare.main([*flags, "--methods", "rkl", "--seeds", "3"]) == 0
    assert len(started) == 1
    report = json.loads((output / "rkl-seed3" / "run" / "report.json").read_text())
    capsys.readouterr()

    assert compare.main([*flags, "--methods", "rkl", "taid", "--seeds", "3"]) == 0
    assert len(started) == 2
    assert "taid-seed3" in started[1][0]
    table = capsys.readouterr().out
    assert (output / "comparison.md").read_text() in table
    assert "| rkl | 1 |" in table
    assert f"{report['kl_after']:.4f}" in table
    assert f"{report['rouge_l_after']:.4f}" in table
    assert report["peak_memory_bytes"] > 2**20
    figures = json.loads((output / "comparison.json").read_text())
    assert list(figures) == ["before training", "rkl", "taid"]
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    # The same start and the same batches: only the objective differs.
    first, second = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (
            output / f"{method}-seed3" / "run" / "evaluations.jsonl"
            for method in ("rkl", "taid")
        )
    )
    assert first[0]["kl"] == second[0]["kl"]
    assert first[-1]["kl"] != second[-1]["kl"]

    again = [*flags, "--methods", "rkl", "taid", "--seeds", "3", "--only-table"]
    assert compare.main(again) == 0
    assert len(started) == 2


def test_compare_goes_on_with_a_cell_that_was_stopped(
    compare, shared, started, monkeypatch
):
    flags, output = shared
    flags += ["--methods", "rkl", "--set", "save_every=1"]
    from taid_jax.train import run

    def stopped(*arguments, **options):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(run, "best_state", stopped)
        assert compare.main(flags) == 1
    assert not (output / "rkl-seed0" / "run" / "report.json").exists()
    assert compare.main(flags) == 0
    assert [call[1:] for call in started] == [["--resume"], ["--resume"]]
    assert (output / "rkl-seed0" / "run" / "report.json").exists()


def test_compare_a_failing_cell_is_told_and_the_others_go_on(
    compare, shared, monkeypatch, capsys
):
    flags, _ = shared

    def run(command, stdout, **options):
        stdout.write("something went wrong\n")
        stdout.flush()
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(compare.subprocess, "run", run)
    assert compare.main([*flags, "--methods", "rkl", "taid"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("something went wrong") == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "nothing"], "nothing has no file"),
        (["--set", "steps"], "need NAME=VALUE, got 'steps'"),
        (["--set", "sed=3"], "no setting is called 'sed'"),
        (["--set", "steps=0"], "steps: need >= 1"),
        (["--set", "steps=[1"], "cannot read 'steps=[1'"),
        (["--config=/nowhere.yaml"], "/nowhere"),
        (["--set", "data=/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_compare_bad_input_is_one_message(
    compare, shared, started, capsys, more, message
):
    flags, _ = shared
    assert compare.main([*flags, "--methods", "rkl", *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_exports_and_reloads(
    train_tpu, load_script, shared, method, tmp_path
):
    torch = pytest.importorskip("torch", reason="reloads in transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags, _ = shared
    recipes = pathlib.Path(__file__).parents[2] / "scripts" / "recipes"
    path = tmp_path / "run.yaml"
    base = [flags[0].removeprefix("--config="), str(recipes / f"methods/{method}.yaml")]
    values = {"base": base, "output": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump(values))
    assert train_tpu.main([f"--config={path}"]) == 0
    student, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "student", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    ids = torch.tensor([tokenizer("The cat takes the house.")["input_ids"]])
    assert torch.isfinite(student(input_ids=ids).logits).all()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert np.isfinite([report["kl_after"], report["loss_after"]]).all()
