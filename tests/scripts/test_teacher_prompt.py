"""`--teacher-prompt`: runs whose teacher sees more than the student."""

import json
import shutil

import pytest

HINT = "The answer is:{answer} {prompt}"
WRITES = [
    "--completion-tokens=6",
    "--completion-temperature=1.0",
    "--buffer-capacity=9",
]


@pytest.mark.slow
@pytest.mark.parametrize("texts", ["data", "student"])
def test_train_with_the_students_prompt_is_the_run_without(
    same_run, train_small, teacher, texts
):
    """Bit for bit: the teacher's rows are the student's, gathered where they are."""
    flags = [f"--teacher={teacher}", f"--texts={texts}"]
    flags += [] if texts == "data" else WRITES
    found = train_small(*flags, "--teacher-prompt={prompt}")
    same_run(found, train_small(*flags))


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
    same_run,
    lines_of,
    train_small,
    load_script,
    small_model,
    texts,
    more,
    tmp_path,
    capsys,
):
    """The start is another model than with the hint, and the student follows it."""
    flags = ["--teacher=self", f"--teacher-prompt={HINT}", "--teacher-seq-len=64"]
    flags += [f"--texts={texts}", "--objective=forward_kl", *more]
    found = train_small(*flags)
    said = capsys.readouterr().out
    assert "teacher: it sees 'The answer is:{answer} {prompt}' in place of the" in said
    assert "nothing to learn" not in said
    first, *_, last = lines_of(found / "evaluations.jsonl")
    assert 0 < last["kl_teacher"] < first["kl_teacher"]
    cut = tmp_path / "run"
    shutil.copytree(found, cut)
    train_small(*flags, "--resume", "--resume-step=2", folder=cut)
    same_run(cut, found)
    if texts == "data":
        scores = tmp_path / "scores.json"
        score = [f"--config={found / 'settings.json'}", f"--json={scores}"]
        score.append(f"--student={found / 'student'}")
        assert load_script("evaluate").main(score) == 0
        assert json.loads(scores.read_text())["kl_teacher"] == last["kl_teacher"]


@pytest.mark.slow
def test_train_prompts_alone_get_the_teachers_answers_behind_its_own(
    lines_of, train_small, small_model, teacher, tmp_path, capsys
):
    """What is only asked: held-out prompts too are answered with the hint."""
    path = tmp_path / "prompts.jsonl"
    asked = [f"The {animal} takes the" for animal in ("cat", "dog", "bird", "mouse")]
    asked += [f"{text} {thing} and" for text in asked for thing in ("house", "ball")]
    rows = [{"prompt": text, "hint": f"{text} river"} for text in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--teacher={teacher}", f"--data={path}", "--texts=student", *WRITES]
    hinted = train_small(*flags, "--teacher-prompt=hint")
    assert "held-out prompts have the teacher's answers" in capsys.readouterr().out
    first = lines_of(hinted / "evaluations.jsonl")[0]
    plain = lines_of(train_small(*flags) / "evaluations.jsonl")[0]
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
