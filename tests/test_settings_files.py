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
    for name in ("epochs", "ctkd_ramp_epochs"):
        with pytest.raises(s.SettingsError, match=name):
            s.from_dict({name: 0.0})


def test_judge_settings_need_answers_for_scores_of_answers():
    assert s.from_dict({"best_by": "rouge_l", "answer_examples": 1})
    with pytest.raises(s.SettingsError, match="answer_examples: need >= 1"):
        s.from_dict({"best_by": "rouge_l"})
    with pytest.raises(s.SettingsError, match="best_by"):
        s.from_dict({"best_by": "bleu"})
