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
        ({"t_start": 1.5}, "0 <= t_start <= 1"),
        ({"t_start": float("nan")}, "0 <= t_start <= 1"),
        ({"t_start": 0.5, "t_end": 0.4}, "0 <= t_start <= t_end <= 1"),
        ({"alpha": -1.0}, "alpha: need >= 0"),
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"b2": 0.99999999}, "0 <= b2 < 1 in float32"),
        ({"b1": 1 - 1e-9}, "0 <= b1 < 1 in float32"),
        ({"beta": 1 - 1e-9}, "0 <= beta < 1 in float32"),
        ({"eps": 1e-50}, "eps: need >= 1e-20"),
        ({"eps": 0.0}, "eps: need >= 1e-20"),
        ({"weight_decay": 1e300}, "0 <= weight_decay <= 1000000.0"),
        ({"weight_decay": 1e5}, "at most 1 / learning_rate, which is 1000"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"clip_norm": 1e300}, "clip_norm: need > 0 in float32"),
        ({"clip_norm": 1e-46}, "is 0"),
        ({"clip_norm": float("inf")}, "clip_norm: need > 0 and finite"),
        # A subnormal number, which XLA takes for 0.
        ({"learning_rate": 1e-40}, "0 < learning_rate <= 10 in float32"),
        ({"learning_rate": 1e-50}, "0 < learning_rate <= 10 in float32"),
        ({"alpha": 1e39}, "alpha: need >= 0 in float32"),
        ({"alpha": 10**400}, "alpha: need >= 0 and finite"),
        ({"temperature": 1e-40}, "1e-06 <= temperature <= 1000000.0"),
        ({"temperature": 1e30}, "1e-06 <= temperature"),
        ({"head_threshold": 1e-7}, "1e-06 <= head_threshold < 1"),
        ({"head_threshold": 0.99999999}, "in float32, in which it is used and is 1"),
        ({"dkd_alpha": 1e300}, "0 <= dkd_alpha <= 1000000.0"),
        ({"dkd_beta": -1e-300}, "0 <= dkd_beta"),
        ({"teacher_weight": 1e-20}, "1e-06 <= teacher_weight <= 0.999999"),
        ({"sample_temperature": 1e-9}, "0 or >= 1e-06"),
        ({"epochs": float("nan")}, "epochs: need > 0"),
        ({"seed": 2**32}, "0 <= seed < 4294967296"),
        ({"seed": 2**63}, "0 <= seed < 4294967296"),
        ({"seed": -1}, "0 <= seed < 4294967296"),
        ({"steps": 2**31}, "steps: need <= 2147483647"),
        ({"steps": 10**5000}, "steps: need <= 2147483647"),
        ({"batch_size": 10**10}, "batch_size: need <= 2147483647"),
        ({"batch_size": 2**24}, "fewer than 2**31 tokens"),
        ({"seq_len": 2**30}, "fewer than 2**31 tokens"),
        ({"join_timeout": 2**31}, "1 <= join_timeout <= 1000000"),
        ({"steps": 60.0}, "steps: need int, got 60.0"),
        ({"alpha": True}, "alpha: need float, got True"),
        ({"alpha": "0.1"}, "alpha: need float, got '0.1'"),
        ({"resume": 1}, "resume: need bool, got 1"),
        ({"student": 3}, "student: need str or none, got 3"),
        ({"objective": ["taid"]}, "objective: need one of taid, forward_kl"),
        ({"output": ""}, "output: need a text that is not empty"),
        ({"student": ""}, "student: need a text that is not empty"),
        ({"output": "runs/a\0b"}, "without control characters"),
        ({"output": "runs/\ud800"}, "half surrogates, got 'runs/\\ud800'"),
        ({"data": "a\nb"}, "without control characters"),
        ({"output": "runs/" + "x" * 256}, "names of at most 255 bytes"),
        ({"output": "runs/" + "é" * 128}, "names of at most 255 bytes"),
        ({"output": "a/" * 3000}, "names of at most 255 bytes"),
        ({"output": "~/runs"}, "written out in place of ~"),
        ({"output": " runs"}, "no white space at its ends"),
        ({"coordinator": "h:\u0661", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"buckets": "\u0666\u0664,128", "pack": False}, "numbers with commas"),
        ({"learning_rat": 1}, "was learning_rate meant?"),
        ({"optimizer": {"steps": 1}}, "optimizer has no setting 'steps'"),
        ({"run": 3}, "run: need names and values, got 3"),
        ({"steps": 1, "run": {"steps": 2}}, "steps is given twice"),
        ({"x" * 10**6: 1}, "no setting is called 'xxx"),
        ({7: 1}, "no setting is called 7"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_from_dict_value_that_the_programs_cannot_hold_is_refused(values, message):
    with pytest.raises(s.SettingsError) as caught:
        s.from_dict(values)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_from_dict_takes_what_is_within_the_bounds():
    values = {
        "b2": 0.9999999,
        "eps": 1e-15,
        "temperature": 1e-6,
        "seed": 2**32 - 1,
        "steps": 2**31 - 1,
        "head_threshold": 1e-6,
        "dkd_alpha": 0,
        "output": "runs/é " + "x" * 245,
        "epochs": 5,
    }
    found = s.flatten(s.from_dict(values))
    own = {name.split(".")[1]: value for name, value in found.items()}
    assert {name: own[name] for name in values} == values
    assert type(found["run.epochs"]) is float


def test_bounds_of_settings_are_those_of_the_code():
    """What a setting allows at its ends, the code that it goes to takes as well."""
    from taid_jax import loss
    from taid_jax.models.sampling import SamplingParams

    for bound in (1e-6, 1e6):
        loss.ForwardKL(bound)
    for bound in (0, 1e6):
        loss.DKD(bound, bound)
    loss.AdaptiveKL(1e-6)
    SamplingParams(1e-6)
    assert s.from_dict({"sample_temperature": 1e-6})


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


def test_contradictions_leave_to_the_checkpoint_what_it_knows_by_content():
    saved = s.from_dict({"teacher": "a", "student": "b", "data": "c", "steps": 9})
    asked = {"teacher": "./a", "student": "/x/b", "data": "c/../c", "epochs": 2.0}
    assert not s.contradictions(saved, s.from_dict(asked, saved))
    for other in ({"student_layers": 3}, {"student_config": "b"}):
        found = s.contradictions(saved, s.from_dict(other, saved))
        assert found[0].startswith("model.student: the checkpoint has 'b', now None")


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
    with pytest.raises(
        s.SettingsError, match=f"template_date: need a {'date' if date else 'text'}"
    ):
        s.from_dict({"template_date": date})
