import json
import pathlib
import subprocess

import numpy as np
import pytest
import yaml

from taid_jax.cli import compare
from taid_jax.cli.compare import METHODS


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
    output = tmp_path / "out"
    return [f"--config={path}", f"--output={output}"], output


@pytest.fixture
def started(monkeypatch):
    """In place of processes: what was started, and the status that each run ends with.

    A run with status 0 leaves the report of a finished one.
    """
    calls, statuses = [], []

    def run(command, stdout, **options):
        calls.append(command[4:])
        status = statuses.pop(0) if statuses else 0
        stdout.write("something went wrong\n" if status else "done\n")
        stdout.flush()
        run = pathlib.Path(command[4].removeprefix("--config=")).parent / "run"
        run.mkdir(exist_ok=True)
        if status == 0:
            values = {"kl_before": 2.0, "kl_after": 0.25 * len(calls)}
            values |= {"rouge_l_before": 0.1, "rouge_l_after": 0.5}
            (run / "report.json").write_text(json.dumps(values))
            row = json.dumps({"step": 0, "kl_teacher": 2.0})
            (run / "evaluations.jsonl").write_text(row + "\n")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(compare.subprocess, "run", run)
    return calls, statuses


def test_compare_makes_the_table_and_runs_no_cell_twice(shared, started, capsys):
    flags, output = shared
    calls, _ = started
    assert compare.main([*flags, "--methods", "rkl", "--seeds", "3"]) == 0
    assert len(calls) == 1
    capsys.readouterr()

    assert compare.main([*flags, "--methods", "rkl", "taid", "--seeds", "3"]) == 0
    assert len(calls) == 2
    assert "taid-seed3" in calls[1][0]
    table = capsys.readouterr().out
    assert (output / "comparison.md").read_text() in table
    assert "| rkl | 1 | 0.2500 |" in table
    assert "| taid | 1 | 0.5000 |" in table
    assert b"\r\ntaid,3,2.0,0.5," in (output / "comparison.csv").read_bytes()
    figures = json.loads((output / "comparison.json").read_text())
    assert list(figures) == ["before training", "rkl", "taid"]
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "comparison.html").read_text()
    assert '<td class="n">0.5000</td>' in page
    assert "All 2 cells have finished" in page

    again = [*flags, "--methods", "rkl", "taid", "--seeds", "3", "--only-table"]
    assert compare.main(again) == 0
    assert len(calls) == 2


def test_compare_a_failing_cell_is_told_and_goes_on_the_next_time(
    shared, started, capsys
):
    flags, output = shared
    calls, statuses = started
    statuses += [1, 0]
    assert compare.main([*flags, "--methods", "rkl", "taid"]) == 1
    assert capsys.readouterr().err.count("something went wrong") == 1
    assert not (output / "rkl-seed0" / "run" / "report.json").exists()
    assert compare.main([*flags, "--methods", "rkl", "taid"]) == 0
    assert [call[1:] for call in calls] == [["--resume"]] * 3
    assert calls[2][0] == calls[0][0]


def test_compare_page_shows_methods_as_text_and_links_their_pages(shared, started):
    flags, output = shared
    _, statuses = started
    name = "<b>&amp; 1#"
    method = output.parent / f"{name}.yaml"
    method.write_text("objective: reverse_kl\n")
    statuses += [0, 1]
    more = ["--methods", str(method), "taid"]
    assert compare.main([*flags, *more]) == 1
    (output / f"{name}-seed0" / "run" / "report.html").write_text("")
    assert compare.main([*flags, *more, "--only-table"]) == 0
    page = (output / "comparison.html").read_text()
    assert "<b>&amp; 1#" not in page
    link = 'href="%3Cb%3E%26amp%3B%201%23-seed0/run/report.html"'
    assert f"<a {link}>&lt;b&gt;&amp;amp; 1#</a>" in page
    assert "1 of 2 cells have not finished, and are in no figure: taid" in page


def test_compare_bad_input_of_a_cell_is_that_of_all(shared, started):
    flags, _ = shared
    calls, statuses = started
    statuses.append(2)
    assert compare.main([*flags, "--methods", "rkl", "taid"]) == 2
    assert len(calls) == 1


def test_compare_shared_settings_are_for_those_methods_that_use_them(shared, started):
    flags, output = shared
    more = ["--methods", "taid", "rkl", "--set", "t_start=0.2"]
    assert compare.main([*flags, *more]) == 0
    found = {
        method: yaml.safe_load((output / f"{method}-seed0/settings.yaml").read_text())
        for method in ("taid", "rkl")
    }
    assert found["taid"]["objective"]["t_start"] == 0.2
    assert found["rkl"]["objective"]["t_start"] == 0.4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "nothing"], "need abkd, adaptive_kl, "),
        (["--set", "steps"], "need NAME=VALUE, got 'steps'"),
        (["--set", "sed=3"], "no setting is called 'sed'"),
        (["--set", "steps=0"], "steps: need >= 1"),
        (["--config=/nowhere.yaml"], "/nowhere"),
    ],
)
def test_compare_bad_input_is_one_message(shared, started, capsys, more, message):
    flags, _ = shared
    assert compare.main([*flags, "--methods", "rkl", *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not started[0]


@pytest.mark.slow
def test_compare_cells_have_the_same_start_and_the_same_batches(shared):
    """In processes of their own, as a user has them."""
    flags, output = shared
    assert compare.main([*flags, "--methods", "rkl", "taid"]) == 0
    first, second = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (
            output / f"{method}-seed0" / "run" / "evaluations.jsonl"
            for method in ("rkl", "taid")
        )
    )
    assert first[0]["kl_teacher"] == second[0]["kl_teacher"]
    assert first[-1]["kl_teacher"] != second[-1]["kl_teacher"]
    report = json.loads((output / "rkl-seed0" / "run" / "report.json").read_text())
    assert f"{report['kl_after']:.4f}" in (output / "comparison.md").read_text()
    assert report["peak_memory_bytes"] > 2**20


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_exports_and_reloads(train_tpu, shared, method, tmp_path):
    torch = pytest.importorskip("torch", reason="reloads in transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags, _ = shared
    more = [f"--method={method}", f"--output={tmp_path / 'run'}"]
    assert train_tpu.main([flags[0], *more]) == 0
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
