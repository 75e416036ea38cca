"""Runs with several teachers, from the flags to the report, and what is refused."""

import json
import shutil

import pytest


@pytest.fixture(scope="module")
def pair(make_model, tmp_path_factory):
    """Two teachers of different depth and width, by names of their own."""
    folder = tmp_path_factory.mktemp("teachers")
    shutil.copytree(make_model(), folder / "cats")
    shutil.copytree(make_model(seed=3, layers=3, d_model=24), folder / "dogs")
    return folder / "cats", folder / "dogs"


@pytest.fixture(scope="module")
def records(questions, tmp_path_factory):
    """Questions of which some say who answers them, one by weights."""
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for number, row in enumerate(rows):
        if number % 3 < 2:
            row["expert"] = ("cats", "dogs")[number % 3]
    rows[2]["expert"] = [1, 3]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def flags(pair, records):
    return [
        *("--teacher", *map(str, pair), "--student-layers=2"),
        *("--teacher-weights", "3", "1", "--teacher-field=expert"),
        *(f"--data={records}", "--held-out-fraction=0.3", "--learning-rate=0.01"),
        *("--steps=8", "--batch-size=8", "--seq-len=48", "--save-every=4"),
    ]


@pytest.fixture(scope="module")
def run(train_tpu, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several") / "run"
    assert train_tpu.main([*flags, f"--output={folder}"]) == 0
    return folder


def test_a_run_with_two_teachers_says_who_teaches(run, pair):
    report = json.loads((run / "report.json").read_text())
    assert report["kl_after"] < report["kl_before"]
    assert report["settings"]["model"]["teacher"] == [str(each) for each in pair]
    notes = " ".join(report["notes"])
    assert f"arithmetic mean 0.75 x {pair[0]} + 0.25 x {pair[1]}, or as" in notes
    said = " ".join(report["data"]["notes"])
    assert "41 of 60 documents say by `expert`" in said
    assert "expert" not in report["data"]["unused_keys"]
    shown = json.loads((run / "shown.json").read_text())
    assert f"{pair[0]} (4 layers) + {pair[1]} (3 layers)" in shown["title"]
    assert len(shown["tokens"]) == 4
    assert f"completions are those of {pair[0]} alone" in " ".join(shown["notes"])
    lines = " ".join(shown["lines"])
    assert "teacher 1: 4 layers" in lines
    assert "teacher 2: 3 layers" in lines


def test_a_run_with_two_teachers_goes_on_bit_for_bit(
    rows_of, same_student, train_tpu, run, tmp_path, capsys
):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    flags = ["--resume", f"--output={again}"]
    assert train_tpu.main([*flags, "--resume-step=4"]) == 0
    assert rows_of(again, 5) == rows_of(run, 5)
    same_student(again, run)


@pytest.mark.slow
def test_two_teachers_see_a_prompt_of_their_own(train_tpu, flags, tmp_path):
    asked = ["--teacher-prompt={answer} {prompt}", "--teacher-seq-len=64", "--steps=2"]
    folder = tmp_path / "run"
    assert train_tpu.main([*flags, *asked, f"--output={folder}"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert "41 of 60 documents say by `expert`" in " ".join(report["data"]["notes"])
    assert report["data"]["dropped"] == {}
    shown = json.loads((folder / "shown.json").read_text())
    assert "rows of 64 tokens" in " ".join(shown["lines"])
    assert len(shown["tokens"]) == 4


def test_another_set_of_teachers_or_records_is_another_run(
    train_tpu, make_model, run, pair, records, tmp_path, capsys
):
    other = tmp_path / "dogs"
    shutil.copytree(make_model(seed=4, layers=3, d_model=24), other)
    changed = tmp_path / "records.jsonl"
    changed.write_text(records.read_text().replace('"cats"', '"dogs"'))
    for flags, message in (
        (["--teacher", str(pair[0]), str(other)], "began with: the teacher's weights"),
        (["--teacher-weights", "1", "1"], "model.teacher_weights: the checkpoint has"),
        ([f"--data={changed}"], "are not those that the checkpoint was trained on"),
    ):
        with_them = ["--resume", f"--output={run}", "--steps=9", *flags]
        assert train_tpu.main(with_them) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_stores_are_the_two_live_teachers_bit_for_bit(
    rows_of, train_tpu, load_script, pair, flags, run, teacher, tmp_path
):
    at = flags.index("--teacher")
    rest = flags[at + 3 :]
    data = [flag for flag in rest if flag.split("=")[0] in ("--data", "--seq-len")]
    data += ["--held-out-fraction=0.3", "--batch-size=8"]
    for each in pair:
        output = tmp_path / each.name
        arguments = [f"--teacher={each}", *data, f"--output={output}"]
        assert load_script("store").main(arguments) == 0
    stores = ["--teacher-store", *(str(tmp_path / each.name) for each in pair)]
    found = tmp_path / "run"
    student = [f"--student={pair[0]}", f"--output={found}"]
    assert train_tpu.main([*stores, *rest, *student]) == 0
    assert rows_of(found) == rows_of(run)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher-weights", "1"], "a weight for each of the 2 teachers"),
        (["--teacher-weights", "1", "0"], "need 0 < teacher_weights"),
        (["--texts=teacher", "--completion-tokens=8"], "teacher_field: need none"),
        (["--teacher-field=who"], "no record of {records} says by `who`"),
        (["--teacher-field=prompt"], "has no part in their text, got 'prompt'"),
        (["--seq-len=65"], "beyond the teacher 1's context of 64"),
    ],
)
def test_flags_of_several_teachers_that_cannot_be(
    train_tpu, flags, records, tmp_path, capsys, more, message
):
    assert _status(train_tpu, [*flags, f"--output={tmp_path / 'run'}", *more]) == 2
    assert message.format(records=records) in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def _status(command, arguments):
    """What one setting says of another is refused by the flags' parser."""
    try:
        return command.main(arguments)
    except SystemExit as error:
        return error.code


def test_a_teacher_with_another_tokenizer_is_named(
    train_tpu, load_script, make_model, flags, pair, tmp_path, capsys
):
    other = make_model(vocab_size=290)
    output = f"--output={tmp_path / 'run'}"
    rest = flags[flags.index("--student-layers=2") :]
    assert train_tpu.main(["--teacher", str(pair[0]), str(other), *rest, output]) == 2
    error = capsys.readouterr().err
    assert (
        f"tokenizers of the first teacher (300 tokens) and teacher 2, {other}" in error
    )
    assert "Several teachers need one tokenizer" in error
    both = ["--teacher", str(pair[0]), str(pair[1]), output]
    assert load_script("store").main(both) == 2
    assert "need one to be stored, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["count", "raise"])
@pytest.mark.parametrize(
    "value", ["folder", "birds", 1, [1], [0, 0], [1, -1], [1, "x"], "[1, 2", {}]
)
def test_a_record_that_names_no_teacher_is_left_out_with_its_place(
    policy, value, tmp_path
):
    from taid_jax.data import DataError
    from taid_jax.data.errors import LeftOut
    from taid_jax.data.intake import read_documents
    from taid_jax.data.teacher_field import TeacherField

    field = TeacherField("expert", ("/a/folder", "b/folder", "cats")[:2], (0.5, 0.5))
    record = {"text": "All of it.", "expert": value}
    ((origin, error),) = read_documents([("line 7", record)], 0, teacher_field=field)
    assert error.reason == "unknown_teacher"
    left_out = LeftOut(policy)
    if policy == "raise":
        with pytest.raises(DataError, match=r"line 7: `expert` needs the name of one"):
            left_out.add(origin, error)
    else:
        left_out.add(origin, error)
        assert left_out.reasons["unknown_teacher"] == 1


@pytest.mark.parametrize(
    ("value", "weights"),
    [
        ("b/folder", (0, 1, 0)),
        ("cats", (0, 0, 1)),
        ([1, 1, 2], (0.25, 0.25, 0.5)),
        ("[0, 1, 0]", (0, 1, 0)),
        ("", (0.5, 0.25, 0.25)),
        (None, (0.5, 0.25, 0.25)),
    ],
)
def test_a_record_names_its_teacher(value, weights):
    from taid_jax.data.teacher_field import TeacherField

    names = "/a/folder", "b/folder", "x/cats"
    field = TeacherField("expert", names, (0.5, 0.25, 0.25))
    assert field.read({"expert": value}) == weights
