"""The recipes against what is published: arXiv:2501.16937 and the methods' papers."""

import itertools
import json
import pathlib
import re

import pytest
import yaml

from taid_jax.cli import plan, train
from taid_jax.recipes import find_recipe, known_recipes, read_recipe
from taid_jax.settings import (
    Settings,
    contradictions,
    flatten,
    to_dict,
    with_steps,
)

JOBS = pathlib.Path(__file__).parents[2] / "scripts" / "recipes"

# Teacher, student and where TAID starts.
PAIRS = {
    "phi3_tinyllama": (
        "microsoft/Phi-3-mini-4k-instruct",
        "TinyLlama/TinyLlama_v1.1",
        0.4,
    ),
    "llama2_tinyllama": (
        "meta-llama/Llama-2-7b-chat-hf",
        "TinyLlama/TinyLlama_v1.1",
        0.2,
    ),
    "zephyr_pythia": (
        "stabilityai/stablelm-zephyr-3b",
        "EleutherAI/pythia-410m",
        0.2,
    ),
}

# Objective, who generates, evaluations of an epoch, and what else the method sets.
METHODS = {
    "sft": ("sft", "data", 1, {}),
    "fkl": ("forward_kl", "data", 1, {"objective.temperature": 1.0}),
    "rkl": ("reverse_kl", "data", 1, {"objective.temperature": 1.0}),
    "tvd": ("total_variation", "data", 1, {}),
    "adaptive_kl": ("adaptive_kl", "data", 1, {"objective.head_threshold": 0.5}),
    "gkd": (
        "jensen_shannon",
        "mixed:0.5",
        1,
        {"objective.teacher_weight": 0.1},
    ),
    "distillm": (
        "skew_forward_kl",
        "adaptive",
        2,
        {"objective.skew": 0.1, "on_policy.adaptive_step": 0.1},
    ),
    "ctkd": ("ctkd", "data", 1, {"objective.ctkd_ramp_epochs": 10.0}),
    "dkd": (
        "dkd",
        "data",
        1,
        {
            "objective.dkd_alpha": 1.0,
            "objective.dkd_beta": 0.5,
            "objective.temperature": 1.0,
        },
    ),
    "taid": (
        "taid",
        "data",
        1,
        {
            "objective.t_end": 1.0,
            "objective.alpha": 5e-4,
            "objective.beta": 0.99,
            "objective.disable_adaptive": False,
        },
    ),
    "taid_linear": (
        "taid",
        "data",
        1,
        {"objective.t_end": 1.0, "objective.disable_adaptive": True},
    ),
}

OTHERS = {
    "on_policy_rkl": ("reverse_kl", "student"),
    "distillm2": ("distillm2", "pairs"),
    "entropy_gated": ("entropy_gated", "student"),
    "amid": ("alpha_mixture", "data"),
    "abkd": ("alpha_beta", "data"),
    "csd": ("concrete_score", "data"),
}
"""Methods that are not in the published comparison: objective, whose texts."""

# The one pair that has another objective for a method.
EXCEPTIONS = {("llama2_tinyllama", "distillm"): "skew_reverse_kl"}

SHARED = {
    "model.dtype": "bfloat16",
    "model.resize_embeddings": True,
    "data.batch_size": 64,
    "data.seq_len": 2048,
    "data.train_on_prompts": True,
    "data.pack": False,
    "data.held_out_batches": 32,  # 32 * 64 >= 2,000 conversations
    "objective.distil_ratio": 1.0,
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0.01,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.clip_norm": 1.0,
    "evaluation.selection_metric": "rouge_l",
    "evaluation.eval_prompts": 2000,
    "evaluation.eval_tokens": 512,
    "run.epochs": 5.0,
    "run.saves_per_epoch": 1,
}
ON_POLICY = {
    "on_policy.buffer_capacity": 1000,
    "on_policy.completion_tokens": 512,
    "on_policy.completion_temperature": 0.0,
}

NAMES = list(itertools.product(PAIRS, METHODS))


def _read(pair, method):
    return read_recipe(pair=pair, method=method)


@pytest.mark.parametrize(("pair", "method"), NAMES)
def test_recipe_is_what_is_published(pair, method):
    teacher, student, t_start = PAIRS[pair]
    objective, texts, evaluations, own = METHODS[method]
    expected = {
        **SHARED,
        **(ON_POLICY if texts != "data" else {}),
        **own,
        "model.teacher": teacher,
        "model.student": student,
        "model.student_layers": None,
        "objective.objective": EXCEPTIONS.get((pair, method), objective),
        # The others have no use for it.
        "objective.t_start": t_start if objective == "taid" else 0.4,
        "on_policy.texts": texts,
        "run.evals_per_epoch": evaluations,
        "run.output": f"runs/{pair}/{method}",
    }
    found = flatten(_read(pair, method))
    assert {name: found[name] for name in expected} == expected


def test_no_part_of_a_recipe_sets_what_another_one_sets():
    assert set(known_recipes("pair")) == set(PAIRS)
    assert set(known_recipes("method")) == {*METHODS, *OTHERS}
    published = find_recipe("pair", "zephyr_pythia").parents[1] / "published.yaml"
    shared, *pairs = (
        {*yaml.safe_load(path.read_text())} - {"base", "methods"}
        for path in (published, *(find_recipe("pair", name) for name in PAIRS))
    )
    for name in METHODS:
        own = {*yaml.safe_load(find_recipe("method", name).read_text())} - {"base"}
        assert not own & shared
        assert not any(own & each or shared & each for each in pairs)


@pytest.mark.parametrize("command", [train, plan])
def test_flags_go_over_the_method_and_that_over_a_file_and_the_pair(
    command, tmp_path, monkeypatch, capsys
):
    """Also from another folder, where the clone is not."""
    monkeypatch.chdir(tmp_path)
    found = []

    def show(settings, machine):
        found.append(settings)
        return 0

    monkeypatch.setattr(plan, "show", show)
    machine = ["--plan=local:1"] if command is train else ["local:1"]
    words = [*machine, "--pair", "llama2_tinyllama", "--method", "distillm"]
    command.main(words)
    assert found.pop() == _read("llama2_tinyllama", "distillm")

    (tmp_path / "here.yaml").write_text("grad_accum: 4\noutput: x\nskew: 0.3\n")
    command.main([*words, "--config=here.yaml", "--epochs=2", "--skew=0.2"])
    here = found.pop()
    assert (here.optimizer.grad_accum, here.run.output) == (4, "x")
    assert (here.run.epochs, here.objective.skew) == (2.0, 0.2)
    # Of the file alone the method's own number is the last word.
    assert read_recipe(config="here.yaml", method="distillm").objective.skew == 0.1

    # What `methods` says of another method is nothing to this one.
    mine = "base: here.yaml\nmethods: {mine: {t_start: 0.1}, taid: {t_start: 0.3}}\n"
    (tmp_path / "own.yaml").write_text(mine)
    (tmp_path / "mine.yaml").write_text("objective: taid\nt_start: 0.9\n")
    command.main([*machine, "--pair=own.yaml", "--method", str(tmp_path / "mine.yaml")])
    assert found.pop().objective.t_start == 0.1

    for words, named in (
        (["--pair=nothing"], "pair: need llama2_tinyllama, phi3_tinyllama"),
        (["--method=nothing.yaml"], "method: need "),
        (["--pair=bad.yaml"], "methods: need names of methods"),
    ):
        (tmp_path / "bad.yaml").write_text("methods: [sft]\n")
        assert command.main([*machine, *words]) == 2
        assert named in capsys.readouterr().err


def test_a_resumed_run_takes_its_pair_and_its_method_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--pair=zephyr_pythia", "--method=taid", "--t-start=0.5"]
    begun = train.parse(words).settings
    folder = tmp_path / begun.run.output
    assert begun.run.output == "runs/zephyr_pythia/taid"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(to_dict(begun)))
    again = train.parse([*words, "--resume"]).settings
    assert contradictions(begun, again) == []
    assert again.run.resume
    alone = train.parse(["--resume", f"--output={begun.run.output}"]).settings
    assert alone == again


def test_recipe_differs_from_the_defaults_in_what_is_published_alone():
    """Nothing slips in: all that no table above names is a default."""
    named = {
        *SHARED,
        *ON_POLICY,
        "model.teacher",
        "model.student",
        "data.data",
        "objective.objective",
        "objective.t_start",
        "on_policy.texts",
        "run.evals_per_epoch",
        "run.output",
    }
    default = flatten(Settings())
    for pair, method in NAMES:
        found = flatten(_read(pair, method))
        other = {name for name in found if found[name] != default[name]} - named
        assert other <= set(METHODS[method][3]), (pair, method)


def test_recipe_of_ctkd_ramps_over_ten_epochs_of_the_data():
    # 64 * 100 rows: 100 steps an epoch.
    settings = with_steps(_read("phi3_tinyllama", "ctkd"), 6400)
    assert settings.objective.ctkd_ramp_steps == 1000
    assert settings.run.steps == 500
    assert settings.run.eval_every == 100
    distillm = with_steps(_read("phi3_tinyllama", "distillm"), 6400)
    assert distillm.run.eval_every == 50


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_say_their_source_and_go_with_every_pair(method):
    text = find_recipe("method", method).read_text()
    assert re.search(r"^# .*arXiv:\d{4}\.\d{5}", text)
    own = yaml.safe_load(text)
    assert (own["objective"], own.get("texts", "data")) == OTHERS[method]
    for found in (
        *(_read(pair, method) for pair in PAIRS),
        read_recipe(config=JOBS / "smoke.yaml", method=method),
    ):
        values = {name.split(".")[1]: value for name, value in flatten(found).items()}
        # All that the file says has an effect and the last word.
        assert {name: values[name] for name in own} == own


def test_smoke_is_little():
    # Shared settings, of which each method takes what it has a use for.
    settings = read_recipe(config=JOBS / "smoke.yaml", method="taid")
    assert settings.model.teacher == "smollm2-135m-instruct"
    assert settings.model.student_layers == 8
    assert settings.data.data == "pydoc-questions"
    assert settings.run.steps <= 20


def test_self_distillation_shows_the_answer_to_the_teacher_alone():
    settings = read_recipe(config=JOBS / "self_distillation.yaml")
    assert settings.model.teaches_itself
    assert settings.model.teacher_ema == 0.99
    assert settings.on_policy.texts == "student"
    assert "{answer}" in settings.data.teacher_prompt
