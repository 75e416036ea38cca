import os

import pytest

from taid_jax import settings as s


def _write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_read_settings_lays_a_file_over_its_bases(tmp_path):
    _write(
        tmp_path,
        one="steps: 5\nseed: 1\nt_start: 0.1\n",
        two="seed: 2\nrun:\n  keep: 7\n",
        top="base: [one.yaml, two.yaml]\nobjective:\n  t_start: 0.3\n",
    )
    found = s.read_settings(tmp_path / "top.yaml")
    assert (found.run.steps, found.run.seed, found.run.keep) == (5, 2, 7)
    assert found.objective.t_start == 0.3
    assert found.run.log_every == s.Settings().run.log_every


def test_read_settings_base_is_found_from_the_file_that_names_it(tmp_path):
    (tmp_path / "inner").mkdir()
    _write(tmp_path, root="steps: 5\n")
    _write(tmp_path / "inner", middle="base: ../root.yaml\n", top="base: middle.yaml\n")
    assert s.read_settings(tmp_path / "inner" / "top.yaml").run.steps == 5


def test_read_settings_lies_over_the_given_settings(tmp_path):
    _write(tmp_path, one="steps: 5\n", top="base: one.yaml\n")
    base = s.from_dict({"steps": 9, "seed": 3})
    found = s.read_settings(tmp_path / "top.yaml", base)
    assert (found.run.steps, found.run.seed) == (5, 3)


def test_read_settings_the_same_base_twice_is_no_cycle(tmp_path):
    _write(
        tmp_path,
        root="steps: 5\n",
        one="base: root.yaml\nsteps: 6\n",
        two="base: root.yaml\n",
        top="base: [one.yaml, two.yaml]\n",
    )
    assert s.read_settings(tmp_path / "top.yaml").run.steps == 5


def test_read_settings_another_student_replaces_that_of_a_base(tmp_path):
    _write(
        tmp_path,
        one="student_layers: 4\n",
        top="base: one.yaml\nstudent: folder\n",
    )
    model = s.read_settings(tmp_path / "top.yaml").model
    assert (model.student, model.student_layers) == ("folder", None)


def test_read_settings_checks_the_whole_and_not_the_parts(tmp_path):
    _write(
        tmp_path,
        one="warmup_steps: 70\n",  # more than the default steps
        top="base: one.yaml\nsteps: 100\n",
    )
    assert s.read_settings(tmp_path / "top.yaml").optimizer.warmup_steps == 70
    with pytest.raises(s.SettingsError, match="fewer than steps"):
        s.read_settings(tmp_path / "one.yaml")


def test_read_settings_cycle_is_named(tmp_path):
    _write(
        tmp_path,
        one="base: two.yaml\n",
        two="base: three.yaml\n",
        three="base: one.yaml\n",
        self="base: [self.yaml]\n",
    )
    order = r"one.yaml -> \S*two.yaml -> \S*three.yaml -> \S*one.yaml"
    with pytest.raises(s.SettingsError, match=order):
        s.read_settings(tmp_path / "one.yaml")
    with pytest.raises(s.SettingsError, match="own base"):
        s.read_settings(tmp_path / "self.yaml")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("base: missing.yaml\n", ["missing.yaml", "a base of", "top.yaml"]),
        ("base: 3\n", ["top.yaml", "a file or a list of files, got 3"]),
        ("base: [3]\n", ["top.yaml", "a file or a list of files"]),
        ("base: bad.yaml\n", ["bad.yaml", "no setting is called 'sed'"]),
        ("base: text.yaml\n", ["text.yaml", "need names and values, got str"]),
    ],
)
def test_read_settings_bad_base_names_the_file(tmp_path, text, messages):
    _write(tmp_path, top=text, bad="sed: 3\n", text="hello\n")
    with pytest.raises(s.SettingsError) as caught:
        s.read_settings(tmp_path / "top.yaml")
    for message in messages:
        assert message in str(caught.value)


def _bomb():
    """Nine levels of nine references: a `repr` of 10**9 entries."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 9):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} [{inner}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: !!int x\n", "cannot read the settings"),
        ("steps: !!float []\n", "cannot read the settings"),
        ("output: !!timestamp 2020-13-45\n", "cannot read the settings"),
        ("steps: !!binary 'a'\n", "cannot read the settings"),
        ("steps: !!python/object/apply:os.getpid []\n", "cannot read the settings"),
        ("steps: " + "[" * 20000, "cannot read the settings"),
        ("steps: " + "{a: " * 20000, "cannot read the settings"),
        ("a: b: c\n", "cannot read the settings"),
        ("\tsteps: 1\n", "cannot read the settings"),
        ("steps: 1\n---\nsteps: 2\n", "cannot read the settings"),
        ("steps: \x00\n", "cannot read the settings"),
        ("? [a]\n: 1\n", "cannot read the settings"),
        (_bomb(), "no setting is called 'a0'"),
        (_bomb() + "\nsteps: *a8\n", "no setting is called 'a0'"),
        ("steps: &a [*a]\n", "steps: need int"),
        ("model: &a {student: *a}\n", "student: need str"),
        ("base: &a [*a]\n", "a file or a list of files"),
        ("steps: 1\nsteps: 2\n", "'steps' is given twice"),
        ("run: {seed: 1, seed: 1}\n", "'seed' is given twice"),
        ("steps: 1\nrun: {steps: 2}\n", "steps is given twice"),
        ("a: &a {steps: 3}\n<<: *a\n", "no setting is called"),
        ("1: 2\n", "no setting is called 1"),
        ("on: 2\n", "no setting is called True"),
        ("steps: 1e3\n", "steps: need int, got 1000.0"),
        ("steps: 60.0\n", "steps: need int, got 60.0"),
        ("steps: true\n", "steps: need int, got True"),
        ("steps: '60'\n", "steps: need int, got '60'"),
        ("steps: 010\n", "steps: need int, got '010'"),
        ("steps: 1:30\n", "steps: need int, got '1:30'"),
        ("steps:\n", "steps: need int, got None"),
        (f"steps: {'9' * 5000}\n", "cannot read the settings"),
        ("alpha: .nan\n", "alpha: need >= 0"),
        ("alpha: .inf\n", "alpha: need >= 0 and finite"),
        ("alpha: '0.1'\n", "alpha: need float, got '0.1'"),
        ("run:\n", "run: need names and values, got None"),
        ("run: [steps]\n", "run: need names and values"),
        ("- steps\n", "need names and values, got list"),
        ("# " + "x" * 10**6, "at most 131072 bytes"),
    ],
    ids=lambda text: text[:30],
)
def test_read_settings_whatever_the_parser_raises_is_one_message(
    tmp_path, text, message
):
    _write(tmp_path, top=text)
    with pytest.raises(s.SettingsError) as caught:
        s.read_settings(tmp_path / "top.yaml")
    assert message in str(caught.value)
    assert "top.yaml" in str(caught.value) or "alpha: need >= 0" in message
    assert len(str(caught.value).replace(str(tmp_path), "")) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the settings"),
        ('{"steps": 1, "steps": 2}', "'steps' is given twice"),
        ('{"run": {"steps": 1, "steps": 1}}', "'steps' is given twice"),
        ('{"alpha": NaN}', "alpha: need >= 0, got nan"),
        ('{"alpha": 1e999}', "alpha: need >= 0 and finite, got inf"),
        ('{"steps": 1.0}', "steps: need int, got 1.0"),
        ('{"output": "\\ud800"}', "half surrogates"),
        ("[" * 100000, "cannot read the settings"),
        ("3", "need names and values, got int"),
        ("", "cannot read the settings"),
    ],
)
def test_read_settings_bad_json_is_one_message(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(s.SettingsError) as caught:
        s.read_settings(path)
    assert message in str(caught.value)


def test_read_settings_gives_back_what_was_written(tmp_path):
    values = {"output": "runs/😀", "data": "1e-4", "student": "no", "teacher": "010"}
    settings = s.from_dict(values | {"alpha": 1e-7, "beta": 0.5, "chunk_size": 8})
    (tmp_path / "run.json").write_text(s.to_json(settings))
    (tmp_path / "run.yaml").write_text(s.to_yaml(settings))
    assert s.read_settings(tmp_path / "run.json") == settings
    assert s.read_settings(tmp_path / "run.yaml") == settings


def test_read_settings_dates_and_numbers_of_yaml_1_2(tmp_path):
    _write(tmp_path, top="output: 2024-01-01\nlearning_rate: 1e-4\nalpha: 1\n")
    found = s.read_settings(tmp_path / "top.yaml")
    assert found.run.output == "2024-01-01"
    assert (found.optimizer.learning_rate, found.objective.alpha) == (1e-4, 1.0)


def test_read_settings_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    names = ["pipe.yaml", "folder.yaml", "loop.yaml", "binary.yaml", "x" * 300, "a\0b"]
    names.append("y" * 5000)
    for path in [*(tmp_path / name for name in names), "/dev/zero", "/dev/stdin", ""]:
        with pytest.raises(s.SettingsError, match="cannot read the settings") as found:
            s.read_settings(path)
        assert len(str(found.value)) < 1000


def test_read_settings_bases_that_multiply_end(tmp_path):
    """Five levels of ten: 10**5 files to read, but for the limit."""
    for level in range(5):
        inner = ", ".join([f"f{level + 1}.yaml"] * 10)
        _write(tmp_path, **{f"f{level}": f"base: [{inner}]\n"})
    _write(tmp_path, f5="steps: 3\n")
    with pytest.raises(s.SettingsError, match="more than 64 files"):
        s.read_settings(tmp_path / "f0.yaml")


def test_with_steps_from_epochs():
    settings = s.from_dict(
        {
            "epochs": 5,
            "evals_per_epoch": 2,
            "ctkd_ramp_epochs": 10,
            "batch_size": 64,
        }
    )
    found = s.with_steps(settings, 1000)  # 15.625 steps an epoch
    assert found.run.steps == 78
    assert found.run.eval_every == found.run.save_every == 8
    assert found.objective.ctkd_ramp_steps == 156
    assert s.with_steps(settings, 1).run.steps == 1


def test_with_steps_leaves_what_is_given_in_steps():
    settings = s.from_dict(
        {"steps": 7, "eval_every": 3, "evals_per_epoch": 2, "ctkd_ramp_steps": 11}
    )
    assert s.with_steps(settings, 1000) == settings


def test_with_steps_contradiction_is_an_error():
    settings = s.from_dict({"epochs": 1, "warmup_steps": 50})
    with pytest.raises(s.SettingsError, match="fewer than steps"):
        s.with_steps(settings, 40)
    with pytest.raises(s.SettingsError, match="steps: need <= 2147483647"):
        s.with_steps(s.from_dict({"epochs": 1e30}), 40)
    for name in ("epochs", "ctkd_ramp_epochs"):
        with pytest.raises(s.SettingsError, match=name):
            s.from_dict({name: 0.0})


def test_judge_settings_need_answers_for_scores_of_answers():
    assert s.from_dict({"best_by": "rouge_l", "answer_examples": 1})
    with pytest.raises(s.SettingsError, match="answer_examples: need >= 1"):
        s.from_dict({"best_by": "rouge_l"})
    with pytest.raises(s.SettingsError, match="best_by"):
        s.from_dict({"best_by": "bleu"})
