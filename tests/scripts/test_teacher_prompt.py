"""`--teacher-prompt`: runs whose teacher sees more than the student."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

HINT = "The answer is:{answer} {prompt}"
WRITES = [
    "--completion-tokens=6",
    "--completion-temperature=1.0",
    "--buffer-capacity=9",
]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(layers=2, seed=3)


@pytest.fixture(scope="module")
def train(train_tpu, model, questions, tmp_path_factory):
    """`train(*flags)`: the folder of a run of a few seconds."""

    def run(*flags, folder=None):
        folder = folder or tmp_path_factory.mktemp("asked") / "run"
        status = train_tpu.main(
            [
                f"--student={model}",
                f"--data={questions}",
                f"--output={folder}",
                "--steps=4",
                "--batch-size=8",
                "--seq-len=48",
                "--eval-every=2",
                "--save-every=2",
                "--held-out-fraction=0.3",
                "--learning-rate=0.01",
                *flags,
            ]
        )
        assert status == 0
        return folder

    return run


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _numbers(folder):
    from taid_jax.train.throughput import MEASURED

    rows = _lines(folder / "metrics.jsonl")
    rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
    return rows, _lines(folder / "evaluations.jsonl")


def _same(folder, other):
    assert _numbers(folder) == _numbers(other)
    weights, others = (
        load_file(each / "student" / "model.safetensors") for each in (folder, other)
    )
    for name, array in weights.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("texts", ["data", "student"])
def test_train_with_the_students_prompt_is_the_run_without(train, teacher, texts):
    """Bit for bit: the teacher's rows are the student's, gathered where they are."""
    flags = [f"--teacher={teacher}", f"--texts={texts}"]
    flags += [] if texts == "data" else WRITES
    found = train(*flags, "--teacher-prompt={prompt}")
    _same(found, train(*flags))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("texts", "more"),
    [
        ("data", ["--pack"]),
        ("student", ["--no-pack", "--teacher-ema=0.75", *WRITES]),
        ("teacher", ["--pack", *WRITES]),
    ],
)
def test_train_self_distillation_learns_from_the_hint_and_resumes(
    train, load_script, model, texts, more, tmp_path, capsys
):
    """The start is another model than with the hint, and the student follows it."""
    flags = ["--teacher=self", f"--teacher-prompt={HINT}", "--teacher-seq-len=64"]
    flags += [f"--texts={texts}", "--objective=forward_kl", *more]
    found = train(*flags)
    said = capsys.readouterr().out
    assert "teacher: it sees 'The answer is:{answer} {prompt}' in place of the" in said
    assert "nothing to learn" not in said
    first, *_, last = _lines(found / "evaluations.jsonl")
    assert 0 < last["kl_teacher"] < first["kl_teacher"]
    cut = tmp_path / "run"
    shutil.copytree(found, cut)
    train(*flags, "--resume", "--resume-step=2", folder=cut)
    _same(cut, found)
    if texts == "data":
        scores = tmp_path / "scores.json"
        score = [f"--config={found / 'settings.json'}", f"--json={scores}"]
        score.append(f"--student={found / 'student'}")
        assert load_script("evaluate").main(score) == 0
        assert json.loads(scores.read_text())["kl_teacher"] == last["kl_teacher"]


@pytest.mark.slow
def test_train_prompts_alone_get_the_teachers_answers_behind_its_own(
    train, model, teacher, tmp_path, capsys
):
    """What is only asked: held-out prompts too are answered with the hint."""
    path = tmp_path / "prompts.jsonl"
    asked = [f"The {animal} takes the" for animal in ("cat", "dog", "bird", "mouse")]
    asked += [f"{text} {thing} and" for text in asked for thing in ("house", "ball")]
    rows = [{"prompt": text, "hint": f"{text} river"} for text in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--teacher={teacher}", f"--data={path}", "--texts=student", *WRITES]
    hinted = train(*flags, "--teacher-prompt=hint")
    assert "held-out prompts have the teacher's answers" in capsys.readouterr().out
    first = _lines(hinted / "evaluations.jsonl")[0]
    plain = _lines(train(*flags) / "evaluations.jsonl")[0]
    assert first["teacher_perplexity"] != plain["teacher_perplexity"]


def test_train_teacher_prompt_that_cannot_be_is_one_message(
    train_tpu, arguments, questions, tmp_path, capsys
):
    flags = [*arguments, f"--data={questions}"]
    for more, message in (
        (["--teacher-prompt={missing} {prompt}"], "(no_teacher_prompt: 60)"),
        (
            ["--teacher-prompt=a", "--teacher-seq-len=65"],
            "beyond the teacher's context",
        ),
    ):
        assert train_tpu.main([*flags, *more]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err) < 800
    assert not (tmp_path / "run").exists()
