import dataclasses
import json

import pytest

from taid_jax import settings as s


def test_settings_json_round_trip_is_the_identity():
    changed = s.from_dict({"steps": 7, "model": {"student_layers": 4}, "alpha": 1e-2})
    assert s.from_dict(json.loads(s.to_json(changed))) == changed
    assert changed.run.steps == 7
    assert changed.model.layers_of_teacher == 4


def test_settings_yaml_round_trip_is_the_identity(tmp_path):
    changed = s.from_dict({"learning_rate": 3e-5, "resume": True, "seq_len": 64})
    path = tmp_path / "run.yaml"
    path.write_text(s.to_yaml(changed))
    assert s.read_settings(path) == changed


def test_settings_yaml_exponent_without_a_point_is_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer:\n  learning_rate: 1e-4\n")
    assert s.read_settings(path).optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"t_start": 1.5}, "0 <= t_start <= t_end <= 1"),
        ({"t_start": float("nan")}, "0 <= t_start <= t_end <= 1"),
        ({"alpha": -1.0}, "alpha >= 0"),
        ({"beta": 1.0}, "0 <= beta < 1"),
        ({"learning_rate": 0.0}, "0 < learning_rate"),
        ({"learning_rate": float("inf")}, "0 < learning_rate"),
        ({"steps": 0}, "steps: need >= 1, got 0"),
        ({"steps": "many"}, "steps: need int, got 'many'"),
        ({"steps": True}, "steps: need int, got True"),
        ({"objective": "kd"}, "objective"),
        ({"student_layers": 0}, "student_layers: need >= 1"),
        ({"student": "a", "student_config": "b"}, "one source for the student"),
        ({"grad_accum": 3}, "a divisor of batch_size, which is 4"),
        ({"warmup_steps": 60}, "fewer than steps"),
        ({"buckets": "64,512", "pack": False}, "2 to seq_len, which is 256"),
        ({"buckets": "128,64", "pack": False}, "rising lengths"),
        ({"buckets": "64;128", "pack": False}, "numbers with commas"),
        ({"buckets": "64"}, "--no-pack beside it"),
        (
            {"buckets": "64", "pack": False, "sampler": "mixed", "sample_tokens": 8},
            "no --buckets beside it",
        ),
        ({"bad_records": "drop"}, "bad_records"),
        ({"sed": 3}, "no setting is called 'sed'"),
        ({"run": {"alpha": 3}}, "run has no setting 'alpha'"),
    ],
)
def test_from_dict_bad_value_says_what_was_needed(values, message):
    with pytest.raises(s.SettingsError) as caught:
        s.from_dict(values)
    assert message in str(caught.value)


def test_from_dict_another_student_replaces_the_base(tmp_path):
    base = s.from_dict({"student_layers": 4})
    assert s.from_dict({"student": "folder"}, base).model.student_layers is None


def test_read_settings_broken_file_is_one_message(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: [1")
    with pytest.raises(s.SettingsError, match="cannot read the settings"):
        s.read_settings(path)
    with pytest.raises(s.SettingsError, match="cannot read the settings"):
        s.read_settings(tmp_path / "missing.yaml")


def test_contradictions_lists_what_a_resumed_run_may_not_change():
    saved = s.Settings()
    asked = s.from_dict({"t_start": 0.2, "seed": 3, "eval_every": 5, "resume": True})
    found = s.contradictions(saved, asked)
    assert [line.split(":")[0] for line in found] == ["objective.t_start", "run.seed"]


def test_every_free_setting_exists():
    assert set(s.flatten(s.Settings())) >= s.FREE_ON_RESUME
    assert dataclasses.is_dataclass(s.Settings)


@pytest.mark.parametrize(("buckets", "steps"), [("", 31), ("64", 35)])
def test_with_steps_counts_the_last_batch_of_an_epoch_of_buckets(buckets, steps):
    """Five epochs of 25 rows: 6.25 batches of 4 each, or 7 of which one is not full."""
    data = {"batch_size": 4, "pack": False, "buckets": buckets}
    settings = s.from_dict({"data": data, "run": {"epochs": 5.0}})
    assert s.with_steps(settings, 25).run.steps == steps


def test_with_date_keeps_the_day_when_the_run_began():
    new = s.Settings()
    assert new.data.template_date is None
    begun = s.with_date(new)
    assert begun.data.template_date is not None
    saved = s.from_dict({"template_date": "2026-01-31"})
    resumed = s.with_date(new, saved)
    assert resumed.data.template_date == "2026-01-31"
    assert s.with_date(resumed).data.template_date == "2026-01-31"
    # Asked for nothing, or the same, a resumed run goes on with it.
    assert not s.contradictions(saved, new)
    assert not s.contradictions(saved, resumed)
    other = s.from_dict({"template_date": "2026-02-01"})
    assert "template_date" in s.contradictions(saved, other)[0]


@pytest.mark.parametrize("date", ["today", "2026-1-1", "20260101", "2026-02-30", ""])
def test_settings_refuse_what_is_no_date(date):
    with pytest.raises(s.SettingsError, match="template_date: need a date"):
        s.from_dict({"template_date": date})
