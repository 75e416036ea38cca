"""The recipes against what is published: arXiv:2501.16937 and the methods' papers."""

import itertools
import pathlib

import pytest
import yaml

from taid_jax.settings import Settings, flatten, read_settings, with_steps

RECIPES = pathlib.Path(__file__).parents[2] / "scripts" / "recipes"

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
    return read_settings(RECIPES / pair / f"{method}.yaml")


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


def test_recipes_are_all_there_and_no_others():
    folders = [path for path in RECIPES.iterdir() if path.is_dir()]
    recipes = {
        (folder.name, path.stem)
        for folder in folders
        if folder.name not in ("pairs", "methods")
        for path in folder.iterdir()
    }
    assert recipes == set(NAMES)
    assert {path.stem for path in (RECIPES / "methods").iterdir()} == set(METHODS)
    assert {path.stem for path in (RECIPES / "pairs").iterdir()} == set(PAIRS)


def test_recipes_repeat_nothing():
    """A recipe names its parts, and no part sets what another one sets."""
    parts = {
        path.relative_to(RECIPES): set(yaml.safe_load(path.read_text()))
        for path in RECIPES.rglob("*.yaml")
    }
    for pair, method in NAMES:
        own = parts[pathlib.Path(pair, f"{method}.yaml")]
        named = {"base", "output"}
        if (pair, method) in EXCEPTIONS:
            named |= {"objective"}
        # DistiLLM alone is validated more often than the others.
        assert own - named <= ({"evals_per_epoch"} if method == "distillm" else set())
    shared = parts[pathlib.Path("published.yaml")]
    for pair, method in NAMES:
        of_pair = parts[pathlib.Path("pairs", f"{pair}.yaml")]
        of_method = parts[pathlib.Path("methods", f"{method}.yaml")] - {"base"}
        assert not shared & of_pair
        assert not of_pair & of_method
        assert not shared & of_method


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


def test_smoke_is_little():
    # Shared settings, of which each method takes what it has a use for.
    method = RECIPES / "methods" / "taid.yaml"
    settings = read_settings(method, under=[RECIPES / "smoke.yaml"])
    assert settings.model.teacher == "smollm2-135m-instruct"
    assert settings.model.student_layers == 8
    assert settings.data.data == "pydoc-questions"
    assert settings.run.steps <= 20
