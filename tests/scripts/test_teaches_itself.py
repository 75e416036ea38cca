"""`--teacher self`: the student's start, or its moving average, as the teacher."""

import functools
import json
import shutil

import pytest


@pytest.fixture(scope="module")
def train(train_small):
    """Half of the loss is on the data: at its start a model is its own teacher's."""
    return functools.partial(train_small, "--distil-ratio=0.5")


@pytest.fixture(scope="module")
def averaged(train):
    return train("--teacher=self", "--teacher-ema=0.75", "--texts=teacher", *TEXTS)


TEXTS = ("--completion-tokens=6", "--completion-temperature=1.0", "--buffer-capacity=9")


@pytest.mark.slow
def test_train_teacher_self_is_the_students_start(
    same_run, lines_of, train, small_model, capsys
):
    found = train("--teacher=self")
    assert "teacher: the student as it starts" in capsys.readouterr().out
    same_run(found, train(f"--teacher={small_model}"))
    first, *_, last = lines_of(found / "evaluations.jsonl")
    assert first["kl_teacher"] == 0
    assert last["kl_teacher"] > 0
    assert last["teacher_perplexity"] == first["teacher_perplexity"]


@pytest.mark.slow
def test_train_teacher_self_average_moves_and_resumes_bit_for_bit(
    same_run, lines_of, train, averaged, tmp_path, capsys
):
    first, middle, last = lines_of(averaged / "evaluations.jsonl")
    figures = [row["teacher_perplexity"] for row in (first, middle, last)]
    assert len({*figures}) == 3
    notes = json.loads((averaged / "report.json").read_text())["notes"]
    assert notes[0].endswith("average of the student's weights, each step keeps 0.75")
    cut = tmp_path / "run"
    shutil.copytree(averaged, cut)
    capsys.readouterr()
    flags = ["--teacher=self", "--teacher-ema=0.75", "--texts=teacher", *TEXTS]
    train(*flags, "--resume", "--resume-step=2", folder=cut)
    same_run(cut, averaged)


@pytest.mark.slow
def test_train_teacher_self_is_not_another_when_resumed(
    train_tpu, averaged, make_model, tmp_path, capsys
):
    cut = tmp_path / "run"
    shutil.copytree(averaged, cut)
    resumed = [f"--output={cut}", "--resume", "--steps=7"]
    for flags, message in (
        (["--teacher-ema=0.5"], "teacher_ema: the checkpoint has 0.75, now 0.5"),
        ([f"--student={make_model(layers=2, seed=4)}"], "the teacher's weights differ"),
    ):
        assert train_tpu.main([*resumed, *flags]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_compares_with_the_start_and_not_with_itself(
    load_script, train, averaged, small_model, tmp_path, capsys
):
    evaluate, scores = load_script("evaluate"), tmp_path / "scores.json"

    def score(folder, *flags):
        own = [f"--config={folder / 'settings.json'}", f"--json={scores}"]
        return evaluate.main([*own, f"--student={folder / 'student'}", *flags])

    found = train("--teacher=self")
    assert score(found) == 0
    report = json.loads((found / "report.json").read_text())
    assert json.loads(scores.read_text())["kl_teacher"] == report["kl_after"] > 0
    assert score(found, "--teacher=self") == 2
    assert "need a model to compare with, got self" in capsys.readouterr().err
    assert score(averaged) == 2
    assert f"--teacher {small_model} compares" in capsys.readouterr().err
    assert score(averaged, f"--teacher={small_model}") == 0
    assert json.loads(scores.read_text())["kl_teacher"] > 0
