"""`--teacher self`: the student's start, or its moving average, as the teacher."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(layers=2, seed=3)


@pytest.fixture(scope="module")
def train(train_tpu, model, questions, tmp_path_factory):
    """`train(*flags)`: the folder of a run of a few seconds."""

    def run(*flags, folder=None):
        folder = folder or tmp_path_factory.mktemp("itself") / "run"
        status = train_tpu.main(
            [
                f"--student={model}",
                f"--data={questions}",
                f"--output={folder}",
                "--steps=6",
                "--batch-size=8",
                "--seq-len=40",
                "--eval-every=3",
                "--save-every=3",
                "--held-out-fraction=0.3",
                "--learning-rate=0.01",
                "--distil-ratio=0.5",
                *flags,
            ]
        )
        assert status == 0
        return folder

    return run


@pytest.fixture(scope="module")
def averaged(train):
    return train("--teacher=self", "--teacher-ema=0.75", "--texts=teacher", *TEXTS)


TEXTS = ("--completion-tokens=6", "--completion-temperature=1.0", "--buffer-capacity=9")


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _numbers(folder):
    from taid_jax.train.throughput import MEASURED

    rows = _lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def _same(folder, other):
    assert _numbers(folder) == _numbers(other)
    assert _lines(folder / "evaluations.jsonl") == _lines(other / "evaluations.jsonl")
    weights, others = (
        load_file(each / "student" / "model.safetensors") for each in (folder, other)
    )
    assert weights.keys() == others.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


@pytest.mark.slow
def test_train_teacher_self_is_the_students_start(train, model, capsys):
    found = train("--teacher=self")
    assert "teacher: the student as it starts" in capsys.readouterr().out
    _same(found, train(f"--teacher={model}"))
    first, *_, last = _lines(found / "evaluations.jsonl")
    assert first["kl_teacher"] == 0
    assert last["kl_teacher"] > 0
    assert last["teacher_perplexity"] == first["teacher_perplexity"]


@pytest.mark.slow
def test_train_teacher_self_average_moves_and_resumes_bit_for_bit(
    train, averaged, tmp_path, capsys
):
    first, middle, last = _lines(averaged / "evaluations.jsonl")
    figures = [row["teacher_perplexity"] for row in (first, middle, last)]
    assert len({*figures}) == 3
    notes = json.loads((averaged / "report.json").read_text())["notes"]
    assert notes[0].endswith("average of the student's weights, each step keeps 0.75")
    cut = tmp_path / "run"
    shutil.copytree(averaged, cut)
    capsys.readouterr()
    flags = ["--teacher=self", "--teacher-ema=0.75", "--texts=teacher", *TEXTS]
    train(*flags, "--resume", "--resume-step=3", folder=cut)
    _same(cut, averaged)


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
    load_script, train, averaged, model, tmp_path, capsys
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
    assert f"--teacher {model} compares" in capsys.readouterr().err
    assert score(averaged, f"--teacher={model}") == 0
    assert json.loads(scores.read_text())["kl_teacher"] > 0
