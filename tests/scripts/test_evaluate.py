import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taid_jax.train.completions import score


@pytest.fixture(scope="session")
def evaluate(load_script):
    return load_script("evaluate")


@pytest.fixture(scope="module")
def judged(train_tpu, teacher, text, tmp_path_factory):
    """The folder of a run that was judged by its answers."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    status = train_tpu.main(
        [
            f"--teacher={teacher}",
            "--student-layers=2",
            f"--data={text}",
            f"--output={folder}",
            "--steps=12",
            "--batch-size=8",
            "--seq-len=16",
            "--eval-every=4",
            "--save-every=0",
            "--held-out-fraction=0.3",
            "--learning-rate=0.01",
            "--eval-prompts=16",
            "--eval-tokens=16",
            "--selection-metric=rouge_l",
        ]
    )
    assert status == 0
    return folder


def _evaluations(folder):
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_train_tpu_writes_all_that_is_judged(judged):
    rows = _evaluations(judged)
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    for row in rows:
        assert 0 <= row["rouge_l"] <= 1
        assert 0 <= row["exact_match"] <= 1
        assert row["loss"] > 0
        assert row["kl_reverse"] > 0
        assert 0 < row["calibration_error"] < 1
        assert row["distinct_2"] is None or 0 < row["distinct_2"] <= 1
    report = json.loads((judged / "report.json").read_text())
    assert report["loss_before"] == rows[0]["loss"]
    assert report["rouge_l_before"] == rows[0]["rouge_l"]
    best = max(rows[1:], key=lambda row: (row["rouge_l"], row["step"]))
    assert report["rouge_l_after"] == best["rouge_l"]
    assert report["kl_after"] == best["kl_teacher"]
    for key in ("kl_reverse", "calibration_error"):
        assert report[f"{key}_before"] == rows[0][key]
        assert report[f"{key}_after"] == best[key]


def test_evaluate_finds_what_the_run_found(evaluate, judged, tmp_path, capsys):
    path = tmp_path / "scores.json"
    flags = [
        f"--config={judged / 'settings.json'}",
        f"--student={judged / 'student'}",
        f"--json={path}",
    ]
    assert evaluate.main(flags) == 0
    out = capsys.readouterr().out
    assert "rouge l" in out
    assert "calibration error" in out
    found = json.loads(path.read_text())
    report = json.loads((judged / "report.json").read_text())
    # The same arithmetic on the same float32 weights.
    keys = ["kl_teacher", "kl_reverse", "student_perplexity", "calibration_error"]
    for key in (*keys, "rouge_l", "exact_match"):
        assert found[key] == report[f"{key.removesuffix('_teacher')}_after"], key
    assert found["teacher_perplexity"] == report["teacher_perplexity"]
    assert found["tokens"] == report["held_out_tokens"]
    assert 0 < found["rouge_l"] < 1
    assert found["settings"]["model"]["student"] == str(judged / "student")


@pytest.mark.slow
@pytest.mark.optimised
def test_evaluate_teacher_as_the_student_is_at_no_distance(
    evaluate, teacher, questions, tmp_path
):
    path = tmp_path / "scores.json"
    flags = [
        f"--teacher={teacher}",
        f"--student={teacher}",
        f"--data={questions}",
        "--batch-size=8",
        "--seq-len=40",
        f"--json={path}",
    ]
    assert evaluate.main(flags) == 0
    found = json.loads(path.read_text())
    # The two products, and each side's log-sum, are rounded on their own.
    assert abs(found["kl_teacher"]) < 1e-8
    same = pytest.approx(found["teacher_perplexity"], rel=1e-6)
    assert found["student_perplexity"] == same
    assert found["rouge_l"] is None


def test_evaluate_needs_a_student(evaluate, teacher, questions, capsys):
    assert evaluate.main([f"--teacher={teacher}", f"--data={questions}"]) == 2
    assert "need the folder" in capsys.readouterr().err


def test_evaluate_takes_the_settings_of_a_run_from_stores(evaluate, tmp_path):
    saved = tmp_path / "settings.json"
    model = {"teacher_store": ["a", "b"], "student": "c", "student_layers": 2}
    saved.write_text(json.dumps({"model": model}))
    model = evaluate.parse([f"--config={saved}", "--student=d"]).settings.model
    assert model.teacher_store == ("a", "b")
    assert (model.student, model.student_layers) == ("d", None)


@pytest.mark.parametrize("kind", ["teacher", "teacher_store"])
def test_evaluate_of_several_teachers_takes_one_alone(evaluate, tmp_path, kind):
    saved, flag = tmp_path / "settings.json", f"--{kind.replace('_', '-')}"
    model = {kind: ["a", "b"], "teacher_weights": [1, 2], "student": "c"}
    saved.write_text(json.dumps({"model": model | {"teacher_field": "who"}}))
    words = [f"--config={saved}", "--student=d", flag]
    model = evaluate.parse([*words, "a"]).settings.model
    assert model.teachers == ("a",)
    assert (model.teacher_weights, model.teacher_field) == ((), None)
    moved = evaluate.parse([*words, "e", "f"]).settings.model
    assert moved.teachers == ("e", "f")
    assert (moved.teacher_weights, moved.teacher_field) == ((1, 2), "who")


@pytest.fixture(scope="module")
def broken(teacher, tmp_path_factory):
    """The teacher's folder with NaN in its last norm."""
    folder = tmp_path_factory.mktemp("broken") / "folder"
    shutil.copytree(teacher, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "side", ["student", pytest.param("teacher", marks=pytest.mark.slow)]
)
def test_evaluate_of_a_model_that_is_not_finite_is_an_error(
    evaluate, teacher, broken, questions, tmp_path, capsys, side
):
    path = tmp_path / "scores.json"
    models = {"teacher": teacher, "student": teacher} | {side: broken}
    flags = [f"--{name}={folder}" for name, folder in models.items()]
    flags += [f"--data={questions}", "--batch-size=8", "--seq-len=40", f"--json={path}"]
    # A student without numbers has no answers to be scored.
    flags += ["--eval-prompts=4", "--eval-tokens=4"]
    assert evaluate.main(flags) == 2
    out, err = capsys.readouterr()
    assert f"error: {broken if side == 'student' else 'the teacher'}: not finite" in err
    assert f"{side}_perplexity nan" in err
    assert "kl_teacher nan" in err
    assert "0.0000" not in out
    assert not path.exists()


@pytest.mark.slow
def test_train_tpu_refuses_a_student_that_is_not_finite(
    train_tpu, teacher, broken, questions, tmp_path, capsys
):
    flags = [
        f"--teacher={teacher}",
        f"--student={broken}",
        f"--data={questions}",
        f"--output={tmp_path / 'run'}",
        "--steps=3",
        "--batch-size=8",
        "--seq-len=40",
    ]
    assert train_tpu.main(flags) == 2
    assert "the student: not finite on held-out text" in capsys.readouterr().err
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.slow
def test_train_tpu_killed_in_an_evaluation_is_the_uninterrupted_run(
    train_tpu, judged, tmp_path, monkeypatch
):
    from taid_jax.train import evaluate

    settings = json.loads((judged / "settings.json").read_text())
    settings["run"]["output"] = str(tmp_path / "run")
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))

    class KilledError(BaseException):  # As a kill, it is nobody's to catch.
        pass

    calls = []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:  # at step 4, with the checkpoint of step 2
            raise KilledError
        return score(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score", killed)
        with pytest.raises(KilledError):
            train_tpu.main([f"--config={path}"])
    assert not (tmp_path / "run" / "report.json").exists()
    assert train_tpu.main([f"--config={path}", "--resume"]) == 0
    assert _evaluations(tmp_path / "run") == _evaluations(judged)
    first, second = (
        load_file(folder / "student" / "model.safetensors")
        for folder in (judged, tmp_path / "run")
    )
    for key, array in first.items():
        np.testing.assert_array_equal(array, second[key], err_msg=key)
