import json
import os
import subprocess
import sys

import pytest

from taid_jax import settings as s

SEVERAL = {"teacher": ["a", "b"]}
ASKED = {"teacher_prompt": "{prompt}"}
ITSELF = {"teacher": "self", "student": "a"}
ON_POLICY = {
    "texts": "mixed:0.5",
    "pack": False,
    "seq_len": 64,
    "completion_tokens": 32,
    "batch_size": 8,
    "buffer_capacity": 8,
}
PAIRS = ON_POLICY | {"texts": "pairs", "objective": "distillm2"}
DKD = {"objective": "dkd"}
KL = {"objective": "forward_kl"}
SHORT = {"pack": False}


def _write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def _refusal(values):
    with pytest.raises(s.SettingsError) as caught:
        s.from_dict(values)
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"t_start": 1.5}, "0 <= t_start <= 1"),
        ({"t_start": float("nan")}, "0 <= t_start <= 1"),
        ({"t_start": 0.5, "t_end": 0.4}, "0 <= t_start <= t_end <= 1"),
        ({"beta": 1.0}, "0 <= beta < 1"),
        ({"learning_rate": 0.0}, "0 < learning_rate"),
        (
            {"matmul_precision": "high", "dtype": "bfloat16"},
            "no effect with dtype bfloat16",
        ),
        ({"steps": 0}, "steps: need >= 1, got 0"),
        ({"steps": "many"}, "steps: need int, got 'many'"),
        ({"steps": True}, "steps: need int, got True"),
        ({"steps": 60.0}, "steps: need int, got 60.0"),
        ({"alpha": "0.1"}, "alpha: need float, got '0.1'"),
        ({"resume": 1}, "resume: need bool, got 1"),
        ({"student": 3}, "student: need str or none, got 3"),
        ({"objective": ["taid"]}, "objective: need one of taid, forward_kl"),
        ({"teacher": []}, "teacher: need at least one"),
        ({"teacher": 5}, "teacher: need str or a list of str, got 5"),
        ({"teacher": ["a", " b"]}, "teacher: need no white space at its ends"),
        ({"teacher_weights": [1.0]}, "need several teachers, as --teacher A B"),
        ({"teacher_mean": "geometric"}, "need several teachers, as --teacher A B"),
        (
            SEVERAL | {"teacher_weights": [1]},
            "need a weight for each of the 2 teachers",
        ),
        (SEVERAL | {"teacher_weights": [1, 0]}, "0 < teacher_weights"),
        (SEVERAL | {"teacher_store": "s", "student": "t"}, "need no teacher beside it"),
        (
            SEVERAL | {"texts": "teacher", "completion_tokens": 64},
            "teacher: need one teacher that writes the texts",
        ),
        (
            SEVERAL
            | {"texts": "pairs", "objective": "distillm2", "completion_tokens": 64},
            "teacher: need one teacher that writes the texts",
        ),
        (
            SEVERAL
            | {"teacher_field": "k", "texts": "student", "completion_tokens": 9},
            "teacher_field: need none",
        ),
        (
            {"teacher": ["b", "self"], "student": "a"},
            "teacher: need self alone, or several other models",
        ),
        (
            SEVERAL | {"teacher_ema": 0.9, "student": "a"},
            "teacher_ema: has no effect with teacher ('a', 'b'): it needs teacher self",
        ),
        (
            {"teacher_store": ["a", "b"], "student": "c"} | ASKED,
            "teacher_prompt: need none with a teacher_store",
        ),
        ({"grad_accum": 3}, "a divisor of batch_size, which is 4"),
        ({"warmup_steps": 60}, "fewer than steps"),
        ({"weight_decay": 1e5}, "at most 1 / learning_rate, which is 1000"),
        (SHORT | {"buckets": "64,512"}, "2 to seq_len, which is 256"),
        (SHORT | {"buckets": "128,64"}, "rising lengths"),
        (SHORT | {"buckets": "64;128"}, "numbers with commas"),
        (SHORT | {"buckets": "\u0666\u0664,128"}, "numbers with commas"),
        (ON_POLICY | {"buckets": "32"}, "no --buckets beside it"),
        (ON_POLICY | {"texts": "mixed:1.01"}, "adaptive, or mixed:SHARE, as mixed:0.5"),
        (
            {"texts": "mixed:half"},
            "need data, student, teacher, pairs, adaptive, or mixed:",
        ),
        (
            {"texts": "none"},
            "need data, student, teacher, pairs, adaptive, or mixed:SHARE",
        ),
        ({"objective": "distillm2"}, "texts: need pairs with objective distillm2"),
        (ON_POLICY | {"objective": "distillm2", "texts": "student"}, "got 'student'"),
        (ON_POLICY | {"texts": "pairs", "batch_size": 5}, "batch_size: need an even"),
        (ON_POLICY | {"completion_tokens": 64}, "need fewer than seq_len, which is 64"),
        (
            ON_POLICY | {"buffer_capacity": 7},
            "buffer_capacity: need at least batch_siz",
        ),
        (ON_POLICY | {"pack": True, "epochs": 1}, "epochs: need steps, or --no-pack"),
        (ON_POLICY | {"rollout_batch": 9}, "rollout_batch, which is 9, got 8"),
        (ON_POLICY | {"completion_temperature": 1e-9}, "0 or >= 1e-06"),
        ({"selection_metric": "rouge_l"}, "eval_prompts: need >= 1"),
        ({"teacher_prompt": "a b"}, "the name of a field, or a template with one"),
        ({"teacher_prompt": "{a"}, "the name of a field, or a template with one"),
        ({"teacher_prompt": "{{a}} {0}"}, "the name of a field, or a template with"),
        ({"teacher_prompt": "{a}\0"}, "teacher_prompt: need text without control"),
        ({"teacher_prompt": "{a}\ud800"}, "control characters and half surrogates"),
        ({"teacher_seq_len": 9}, "teacher_seq_len: has no effect with teacher_prompt"),
        (ASKED | {"train_on_prompts": True}, "train_on_prompts: has no effect with te"),
        (ASKED | {"pack": False, "buckets": "64"}, "buckets: has no effect with teach"),
        (ASKED | {"objective": "sft"}, "teacher_prompt: need none with objective sft"),
        (
            ASKED | {"teacher_store": "a", "student": "b"},
            "teacher_prompt: need none with a teacher_store",
        ),
        (
            ASKED | ON_POLICY | {"teacher_seq_len": 32},
            "completion_tokens: need fewer than teacher_seq_len, which is 32",
        ),
        ({"teacher": "self"}, "student: need --student MODEL with teacher self"),
        (ITSELF | {"student_layers": 2}, "cut from a model, or random"),
        ({"teacher": "self", "student_config": "a"}, "cut from a model, or random"),
        (ITSELF | {"resize_embeddings": True}, "it off with teacher self"),
        (ITSELF | {"objective": "sft"}, "teacher: need another than self with obje"),
        (ITSELF | {"teacher_store": "a"}, "teacher_store: need no teacher beside it"),
        ({"teacher": "./self", "teacher_ema": 0.9}, "it needs teacher self"),
        (ITSELF | {"teacher_ema": 1 - 1e-9}, "0 < teacher_ema < 1 in float32"),
        (
            ITSELF | {"teacher_ema": 0.9, "teacher_sharding": "replicated"},
            "teacher_sharding: has no effect with teacher_ema 0.9",
        ),
        # What the programs hold in float32 and int32.
        ({"b2": 0.99999999}, "0 <= b2 < 1 in float32"),
        ({"eps": 1e-50}, "eps: need >= 1e-20"),
        ({"clip_norm": 1e300}, "clip_norm: need > 0 in float32"),
        ({"clip_norm": 1e-46}, "is 0"),
        ({"clip_norm": float("inf")}, "clip_norm: need > 0 and finite"),
        # A subnormal number, which XLA takes for 0.
        ({"learning_rate": 1e-40}, "0 < learning_rate <= 10 in float32"),
        ({"alpha": 10**400}, "alpha: need >= 0 and finite"),
        ({"seed": 2**32}, "0 <= seed < 4294967296"),
        ({"steps": 2**31}, "steps: need <= 2147483647"),
        ({"steps": 10**5000}, "steps: need <= 2147483647"),
        ({"batch_size": 2**24}, "fewer than 2**31 tokens"),
        ({"output": ""}, "output: need a text that is not empty"),
        ({"output": "runs/a\0b"}, "without control characters"),
        ({"output": "runs/\ud800"}, "half surrogates, got 'runs/\\ud800'"),
        ({"output": "runs/" + "é" * 128}, "names of at most 255 bytes"),
        ({"output": "a/" * 3000}, "names of at most 255 bytes"),
        ({"output": "~/runs"}, "written out in place of ~"),
        ({"output": " runs"}, "no white space at its ends"),
        ({"template_date": "2026-02-30"}, "template_date: need a date"),
        ({"template_date": "20260101"}, "template_date: need a date"),
        ({"coordinator": "h:1"}, "all three, or none of them"),
        ({"coordinator": "h:\u0661", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "h:0", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "h:70000", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": ":1", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        (
            {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
            "0 <= process_id",
        ),
        ({"learning_rat": 1}, "was learning_rate meant?"),
        ({"sed": 3}, "no setting is called 'sed'"),
        ({"run": {"alpha": 3}}, "run has no setting 'alpha'"),
        ({"run": 3}, "run: need names and values, got 3"),
        ({"steps": 1, "run": {"steps": 2}}, "steps is given twice"),
        ({"x" * 10**6: 1}, "no setting is called 'xxx"),
        ({7: 1}, "no setting is called 7"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_from_dict_says_what_was_needed(values, message):
    assert message in _refusal(values)


@pytest.mark.parametrize(
    ("name", "least", "most", "beside"),
    [
        ("temperature", 1e-6, 1e6, KL),
        ("teacher_weight", 1e-6, 1 - 1e-6, {"objective": "jensen_shannon"}),
        ("skew", 1e-6, 1 - 1e-6, {"objective": "skew_reverse_kl"}),
        ("head_threshold", 1e-6, 0.999999, {"objective": "adaptive_kl"}),
        ("dkd_alpha", 0, 1e6, DKD),
        ("dkd_beta", 0, 1e6, DKD),
        ("alpha_beta_a", 0, 4, {"objective": "alpha_beta"}),
        ("alpha_beta_b", 0, 4, {"objective": "alpha_beta"}),
        ("entropy_threshold", 0, 100, {"objective": "entropy_gated"}),
        ("adaptive_step", 0, 1, ON_POLICY | {"texts": "adaptive"}),
        ("completion_top_p", 1e-6, 1, ON_POLICY | {"completion_temperature": 1.0}),
        ("weight_decay", 0, 100, {"learning_rate": 1e-3}),
        ("seed", 0, 2**32 - 1, {}),
        ("join_timeout", 1, 10**6, {}),
    ],
)
def test_from_dict_takes_what_is_within_the_bounds(name, least, most, beside):
    for value in (least, most):
        found = s.flatten(s.from_dict(beside | {name: value}))
        assert next(v for k, v in found.items() if k.endswith("." + name)) == value
    for value in (least - (least or 1), most * 1000):
        assert name in _refusal(beside | {name: value})


def test_from_dict_takes_shapes_of_either_sign():
    beside = {"objective": "alpha_mixture"}
    for shape in (-9, -1.0, 1, 9):
        found = s.from_dict(beside | {"mixture_shape": shape})
        assert found.objective.mixture_shape == shape
    for shape in (-9.1, 9.1):
        assert "-9 <= mixture_shape <= 9" in _refusal(beside | {"mixture_shape": shape})


def test_from_dict_needs_a_power_of_the_alpha_beta_divergence():
    beside = {"objective": "alpha_beta", "alpha_beta_a": 0.0}
    assert "alpha_beta_a, alpha_beta_b" in _refusal(beside | {"alpha_beta_b": 1e-3})
    assert s.from_dict(beside | {"alpha_beta_b": 0.5})


def test_bounds_of_settings_are_those_of_the_losses():
    from taid_jax import loss

    for bound in (1e-6, 1e6):
        loss.ForwardKL(bound)
    for bound in (0, 1e6):
        loss.DKD(bound, bound)
    loss.AdaptiveKL(1e-6)
    for bound in (-9, 9):
        loss.AlphaMixture(0.5, bound)
    for powers in ((4, 4), (0, 0.01), (0.01, 0)):
        loss.AlphaBeta(*powers)
    for bound in (0, 100):
        loss.EntropyGated(bound)


JSD, TV = {"objective": "jensen_shannon"}, {"objective": "total_variation"}
LINEAR, ALONE = {"disable_adaptive": True}, {"cluster": "none"}
COORDINATED = {"coordinator": "h:1", "num_processes": 1, "process_id": 0}
RAMP = {"objective": "ctkd", "ctkd_ramp_epochs": 2.0}
WITHOUT_EFFECT = [
    ("objective taid", KL, "t_start=0.2 t_end=0.9 alpha=1e-3 disable_adaptive=true"),
    ("disable_adaptive False", LINEAR, "alpha=1e-3 beta=0.9"),
    ("objective forward_kl or reverse_kl", {}, "temperature=2.0"),
    ("or dkd", TV, "temperature=2.0"),
    ("or dkd", {"objective": "ctkd"}, "temperature=2.0"),
    ("jensen_shannon", {"objective": "skew_forward_kl"}, "teacher_weight=0.3"),
    ("objective skew_forward_kl or", JSD, "skew=0.3"),
    ("objective adaptive_kl", {}, "head_threshold=0.3"),
    ("objective alpha_mixture", {}, "mixture_shape=-1.0"),
    ("alpha_beta", {"objective": "alpha_mixture"}, "alpha_beta_a=1.0 temperature=2.0"),
    ("objective alpha_beta", KL, "alpha_beta_b=1.0"),
    ("objective concrete_score", {}, "score_weights=teacher"),
    ("objective entropy_gated", {}, "entropy_threshold=0.5"),
    ("objective dkd", {}, "dkd_alpha=2.0 dkd_beta=2.0"),
    ("objective ctkd", {}, "ctkd_ramp_steps=3 ctkd_ramp_epochs=3.0"),
    ("objective taid or", {"objective": "sft"}, "distil_ratio=0.5"),
    ("objective taid or", PAIRS, "distil_ratio=0.5"),
    ("objective forward_kl or", PAIRS, "temperature=2.0"),
    ("texts other than data", {}, "buffer_capacity=9 completion_tokens=9 reuse=2"),
    ("texts other than data", {}, "completion_temperature=1.0 rollout_batch=8"),
    ("completion_temperature > 0", ON_POLICY, "completion_top_k=5"),
    ("completion_temperature > 0", ON_POLICY, "completion_top_p=0.5"),
    ("texts adaptive", ON_POLICY, "adaptive_step=0.2"),
    ("eval_prompts >= 1", {}, "eval_tokens=9"),
    ("pack False", {}, "buckets=64"),
    ("fused True", {"fused": False}, "chunk_size=9"),
    ("resume True", {}, "resume_step=9"),
    ("cluster auto or", ALONE, "join_timeout=9 heartbeat_timeout=9"),
    ("coordinator None", COORDINATED, "cluster=slurm"),
    ("no steps beside it", {"epochs": 2.0}, "steps=7"),
    ("no eval_every beside it", {"evals_per_epoch": 2}, "eval_every=7"),
    ("no save_every beside it", {"saves_per_epoch": 2}, "save_every=7"),
    ("no ctkd_ramp_steps beside it", RAMP, "ctkd_ramp_steps=7"),
    ("no student beside it", {"student": "a"}, "student_config=b"),
    ("no student_layers beside it", {"student_layers": 4}, "student_config=b"),
]


@pytest.mark.parametrize(("reason", "beside", "flags"), WITHOUT_EFFECT)
def test_from_dict_setting_without_effect_is_refused_by_name(reason, beside, flags):
    for flag in flags.split():
        name, _, text = flag.partition("=")
        value = text if name in ("buckets", "cluster") else s.parse_yaml(text)
        message = _refusal(beside | {name: value})
        assert reason in message
        assert message.split(":")[0] in {name, *beside}
        # Left out where it is only offered, by a base or to several methods.
        assert s.from_dict(beside | {name: value}, strict=False)


def test_from_dict_default_without_effect_counts_as_not_given():
    values = KL | {"t_start": 0.4, "dkd_alpha": 1.0, "epochs": 3.0, "steps": 60}
    found = s.from_dict(values)
    assert (found.run.steps, found.run.epochs) == (60, 3.0)


def test_from_dict_lays_over_what_says_the_same_in_another_way():
    base = s.from_dict({"student_layers": 4, "epochs": 2.0, "evals_per_epoch": 3})
    found = s.from_dict({"student": "a", "steps": 60, "eval_every": 9}, base)
    assert (found.model.student, found.model.student_layers) == ("a", None)
    assert (found.run.steps, found.run.epochs) == (60, None)
    assert (found.run.eval_every, found.run.evals_per_epoch) == (9, None)
    assert s.from_dict({"epochs": 1}, found).run.epochs == 1.0
    # The base's t_start was TAID's.
    taid = s.from_dict({"t_start": 0.2})
    assert s.from_dict(KL, taid).objective.t_start == 0.4


@pytest.mark.parametrize("given", ["teacher", "teacher_store"])
@pytest.mark.parametrize("there", ["teacher", "teacher_store"])
def test_make_room_for_other_teachers_keeps_what_needs_several(there, given):
    about = {"teacher_weights": [1, 2], "teacher_field": "who", "student": "s"}
    model = s.make_room(s.from_dict(about | {there: ["a", "b"]}), [given]).model
    assert (model.teacher_weights, model.teacher_field) == ((1, 2), "who")
    # What is given takes the place of this.
    assert getattr(model, given) == ("a", "b")


def test_make_room_for_another_store_keeps_how_it_is_read():
    base = s.from_dict({"teacher_store": "a", "student": "s", "tail": "uniform"})
    assert s.make_room(base, ["teacher_store"]) == base


def test_make_room_for_flags_to_come():
    base = s.from_dict({"student_layers": 4, "epochs": 2.0, "saves_per_epoch": 3})
    found = s.make_room(base, ["student", "save_every", "seed", "nonsense"])
    assert found.model.student_layers is None
    assert (found.run.epochs, found.run.saves_per_epoch) == (2.0, None)


def test_read_settings_lays_a_file_over_its_bases(tmp_path):
    (tmp_path / "inner").mkdir()
    _write(tmp_path, root="log_every: 3\n", one="steps: 5\nseed: 1\nt_start: 0.1\n")
    _write(
        tmp_path / "inner",
        two="base: ../root.yaml\nseed: 2\nrun:\n  keep: 7\n",
        top="base: [../one.yaml, two.yaml]\nobjective:\n  t_start: 0.3\n",
    )
    base = s.from_dict({"save_every": 9, "seed": 3})
    found = s.read_settings(tmp_path / "inner" / "top.yaml", base)
    assert (found.run.steps, found.run.seed, found.run.keep) == (5, 2, 7)
    assert (found.run.log_every, found.run.save_every) == (3, 9)
    assert found.objective.t_start == 0.3


def test_read_settings_the_same_base_twice_is_no_cycle(tmp_path):
    _write(
        tmp_path,
        root="steps: 5\n",
        one="base: root.yaml\nsteps: 6\n",
        two="base: root.yaml\n",
        top="base: [one.yaml, two.yaml]\n",
    )
    assert s.read_settings(tmp_path / "top.yaml").run.steps == 5


def test_read_settings_checks_the_whole_and_not_the_parts(tmp_path):
    _write(
        tmp_path,
        one="warmup_steps: 70\nt_start: 0.2\nstudent_layers: 4\nepochs: 3\n",
        top="base: one.yaml\nsteps: 100\nobjective: forward_kl\nstudent: folder\n",
        method="objective: reverse_kl\n",
        silent="objective: reverse_kl\nt_start: 0.2\n",
    )
    found = s.read_settings(tmp_path / "top.yaml")
    assert found.optimizer.warmup_steps == 70
    assert (found.run.steps, found.run.epochs) == (100, None)
    assert (found.model.student, found.model.student_layers) == ("folder", None)
    # What a base offers is left out where it has no effect; what a file says is not.
    assert found.objective.t_start == 0.4
    under = [tmp_path / "top.yaml"]
    found = s.read_settings(tmp_path / "method.yaml", under=under)
    assert (found.objective.objective, found.run.steps) == ("reverse_kl", 100)
    with pytest.raises(s.SettingsError, match="t_start: has no effect"):
        s.read_settings(tmp_path / "silent.yaml", under=under)


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


def test_read_settings_bases_that_multiply_end(tmp_path):
    """Five levels of ten: 10**5 files to read, but for the limit."""
    for level in range(5):
        inner = ", ".join([f"f{level + 1}.yaml"] * 10)
        _write(tmp_path, **{f"f{level}": f"base: [{inner}]\n"})
    _write(tmp_path, f5="steps: 3\n")
    with pytest.raises(s.SettingsError, match="more than 64 files"):
        s.read_settings(tmp_path / "f0.yaml")


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
        ("base: missing.yaml\n", "missing.yaml, which is a base of"),
        ("base: [3]\n", "a file or a list of files"),
        ("base: bad.yaml\n", "bad.yaml: no setting is called 'sed'"),
        ("base: text.yaml\n", "need names and values, got str"),
        ("steps: !!int x\n", "cannot read the settings"),
        ("output: !!timestamp 2020-13-45\n", "cannot read the settings"),
        ("steps: !!binary 'a'\n", "cannot read the settings"),
        ("steps: !!python/object/apply:os.getpid []\n", "cannot read the settings"),
        ("steps: " + "[" * 20000, "cannot read the settings"),
        ("a: b: c\n", "cannot read the settings"),
        ("steps: 1\n---\nsteps: 2\n", "cannot read the settings"),
        ("steps: \x00\n", "cannot read the settings"),
        ("? [a]\n: 1\n", "cannot read the settings"),
        (_bomb() + "\nsteps: *a8\n", "no setting is called 'a0'"),
        ("steps: &a [*a]\n", "steps: need int"),
        ("base: &a [*a]\n", "a file or a list of files"),
        ("run: {seed: 1, seed: 1}\n", "'seed' is given twice"),
        ("a: &a {steps: 3}\n<<: *a\n", "no setting is called"),
        ("steps: 1e3\n", "steps: need int, got 1000.0"),
        ("steps: 010\n", "steps: need int, got '010'"),
        ("steps: 1:30\n", "steps: need int, got '1:30'"),
        ("steps:\n", "steps: need int, got None"),
        (f"steps: {'9' * 5000}\n", "cannot read the settings"),
        ("alpha: .nan\n", "alpha: need >= 0"),
        ("run: [steps]\n", "run: need names and values"),
        ("# " + "x" * 10**6, "at most 131072 bytes"),
        ("JSON {", "cannot read the settings"),
        ('JSON {"run": {"steps": 1, "steps": 1}}', "'steps' is given twice"),
        ('JSON {"alpha": 1e999}', "alpha: need >= 0 and finite, got inf"),
        ("JSON " + "[" * 100000, "cannot read the settings"),
        ("JSON 3", "need names and values, got int"),
    ],
    ids=lambda text: text[:30],
)
def test_read_settings_whatever_the_parser_raises_is_one_message(
    tmp_path, text, message
):
    _write(tmp_path, bad="sed: 3\n", text="hello\n")
    path = tmp_path / ("top.json" if text.startswith("JSON ") else "top.yaml")
    path.write_text(text.removeprefix("JSON "))
    with pytest.raises(s.SettingsError) as caught:
        s.read_settings(path)
    assert message in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 600


def test_read_settings_gives_back_what_was_written(tmp_path):
    values = {"output": "runs/😀", "data": "1e-4", "student": "no", "teacher": "010"}
    settings = s.from_dict(values | {"alpha": 1e-7, "beta": 0.5, "chunk_size": 8})
    (tmp_path / "run.json").write_text(json.dumps(s.to_dict(settings)))
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
    for path in [*(tmp_path / name for name in names), "/dev/zero", "/dev/stdin", ""]:
        with pytest.raises(s.SettingsError, match="cannot read the settings") as found:
            s.read_settings(path)
        assert len(str(found.value)) < 1000


def test_contradictions_lists_what_a_resumed_run_may_not_change():
    saved = s.Settings()
    asked = s.from_dict(
        {"t_start": 0.2, "seed": 3, "eval_every": 5, "resume": True, "cluster": "none"}
    )
    found = s.contradictions(saved, asked)
    assert [line.split(":")[0] for line in found] == ["objective.t_start", "run.seed"]


def test_contradictions_leave_to_the_checkpoint_what_it_knows_by_content():
    saved = s.from_dict({"teacher": "a", "student": "b", "data": "c", "steps": 9})
    asked = {"teacher": "./a", "student": "/x/b", "data": "c/../c", "epochs": 2.0}
    assert not s.contradictions(saved, s.from_dict(asked, saved))
    for other in ({"student_layers": 3}, {"student_config": "b"}):
        found = s.contradictions(saved, s.from_dict(other, saved))
        assert found[0].startswith("model.student: the checkpoint has 'b', now None")


def test_contradictions_date_is_free_unless_another_is_asked_for():
    saved = s.from_dict({"template_date": "2026-01-31"})
    assert not s.contradictions(saved, s.Settings())
    other = s.from_dict({"template_date": "2026-02-01"})
    assert "template_date" in s.contradictions(saved, other)[0]


def test_contradictions_name_the_evaluations_that_move_the_adaptive_threshold():
    for texts, expected in (("mixed:0.5", []), ("adaptive", ["run.eval_every"])):
        saved = s.from_dict(ON_POLICY | {"texts": texts})
        asked = s.from_dict({"eval_every": 3, "save_every": 2}, saved)
        found = s.contradictions(saved, asked)
        assert [line.split(":")[0] for line in found] == expected


def test_with_steps_from_epochs():
    values = {"epochs": 5, "evals_per_epoch": 2, "saves_per_epoch": 1, "batch_size": 64}
    ramp = {"objective": "ctkd", "ctkd_ramp_epochs": 10}
    found = s.with_steps(s.from_dict(values | ramp), 1000)  # 15.625 steps an epoch
    assert (found.run.steps, found.run.epochs) == (78, None)
    assert (found.run.eval_every, found.run.save_every) == (8, 16)
    assert found.objective.ctkd_ramp_steps == 156
    assert s.with_steps(s.from_dict(values), 1).run.steps == 1
    # Its own steps are as good as given.
    assert s.with_steps(found, 7) == found
    # Two texts of each prompt.
    assert s.with_steps(s.from_dict(PAIRS | {"epochs": 3.0}), 100).run.steps == 75
    each = s.from_dict({"steps": 7, "evals_per_epoch": 2})
    assert s.with_steps(each, 40).run.eval_every == 5
    assert s.with_steps(each, 40).run.save_every == 20


@pytest.mark.parametrize(("buckets", "steps"), [("", 31), ("64", 35)])
def test_with_steps_counts_the_last_batch_of_an_epoch_of_buckets(buckets, steps):
    """Five epochs of 25 rows: 6.25 batches of 4 each, or 7 of which one is not full."""
    data = {"batch_size": 4, "pack": False, "buckets": buckets}
    settings = s.from_dict({"data": data, "run": {"epochs": 5.0}})
    assert s.with_steps(settings, 25).run.steps == steps


def test_with_steps_contradiction_is_an_error():
    settings = s.from_dict({"epochs": 1, "warmup_steps": 50})
    with pytest.raises(s.SettingsError, match="fewer than steps"):
        s.with_steps(settings, 40)
    with pytest.raises(s.SettingsError, match="steps: need <= 2147483647"):
        s.with_steps(s.from_dict({"epochs": 1e30}), 40)


def test_every_setting_has_a_help_of_its_own():
    for name in s.to_dict(s.Settings()):
        kind = type(getattr(s.Settings(), name))
        for field in s.to_dict(s.Settings())[name]:
            assert f"        {field}: " in kind.__doc__, (name, field)


def test_settings_show_what_they_offer_alone():
    assert {"Settings", "setting", "read_settings"} <= {*dir(s)}
    assert not {"cast", "math", "typed_fields"} & {*dir(s)}


def test_settings_import_neither_jax_nor_what_it_brings():
    code = "import sys, taid_jax.settings; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    modules = set(found.stdout.split())
    assert not modules & {"jax", "numpy", "transformers", "datasets", "orbax"}


def test_several_teachers_go_through_yaml_and_json_and_one_stays_a_text():
    several = {"teacher": ["a", "b"], "teacher_weights": [3, 1], "teacher_field": "who"}
    settings = s.from_dict(several)
    assert settings.model.teachers == ("a", "b")
    assert settings.model.shares_of_teachers == (0.75, 0.25)
    for values in (s.parse_yaml(s.to_yaml(settings)), json.dumps(s.to_dict(settings))):
        values = json.loads(values) if isinstance(values, str) else values
        assert s.from_dict(values) == settings
    assert s.from_dict({"teacher": ["a"]}).model.teacher == "a"
    itself = {"teacher": ["self"], "teacher_ema": 0.9, "student": "a"}
    assert s.from_dict(itself).model.teaches_itself
    assert not s.from_dict(several | ASKED).model.teaches_itself
    stores = s.from_dict({"teacher_store": ["s", "t", "u"], "student": "b"}).model
    assert stores.teachers == ("s", "t", "u")
    assert stores.shares_of_teachers == (1 / 3,) * 3


def test_teacher_prompt_of_several_lines_is_saved_as_it_is(tmp_path):
    text = "Here is the solution:\n\n\t{answer}\n\n{prompt}\n"
    settings = s.from_dict({"teacher_prompt": text, "teacher_seq_len": 512})
    path = tmp_path / "settings.yaml"
    path.write_text(s.to_yaml(settings))
    assert s.read_settings(path) == settings
    assert settings.data.teacher_len == 512
