import pytest

from taid_jax.models.presets import PRESETS
from taid_jax.plan import PlanError, make_plan, pair_configs
from taid_jax.train.folder import RunFolder

pytestmark = pytest.mark.optimised

PROMISED = {
    "chips",
    "hbm_limit_bytes",
    "argument_bytes",
    "temp_bytes",
    "peak_bytes",
    "fits",
    "flops_per_chip",
    "collectives",
    "compile_seconds",
    "step_seconds_lower_bound",
    "binds",
    "parts",
}


@pytest.mark.slow
def test_make_plan_writes_what_it_promises(made, folder):
    plan, values = made
    assert values.keys() >= PROMISED
    assert values["chips"] == 8
    assert values["fits"] is True
    assert values["peak_bytes"] == plan.peak_bytes
    gather = values["collectives"]["all-gather"]
    assert gather["count"] == plan.collectives.count["all-gather"] > 0
    assert gather["bytes"] > 0
    assert values["settings"]["model"]["teacher"] == str(folder)
    parts = values["parts"]
    # Three layers of the teacher and two of the student, whose backward has twice the
    # products and computes the layers again.
    forward = parts["student forward"]["flops"]
    assert parts["teacher"]["flops"] == 1.5 * forward
    assert parts["optimizer"]["flops"] == 0
    assert parts["backward"]["flops"] == pytest.approx(3 * forward, rel=0.1)
    # The head forms three products of the student's and one of the teacher's.
    tokens, width, vocabulary = 16 * 32 // 8, 32, 96
    assert parts["head"]["flops"] == 4 * 2 * tokens * width * vocabulary
    assert sum(part["flops"] for part in parts.values()) == values["flops_per_chip"]
    for part in parts.values():
        assert part["bytes"] > 0
    sent = sum(part["sent"] for part in parts.values())
    assert sent == pytest.approx(plan.collectives.sent)


def test_make_plan_replaces_only_plans(make_run, tmp_path, quiet):
    (tmp_path / "plan.json").write_text('{"mine": 1}')
    with pytest.raises(PlanError, match="left alone"):
        make_plan(make_run(tmp_path), "local:8", quiet)
    assert (tmp_path / "plan.json").read_text() == '{"mine": 1}'


def test_make_plan_leaves_room_for_the_run_itself(make_settings, tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    settings = make_settings(output=str(tmp_path))
    assert RunFolder(settings.run).check() is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": "someone/model"}, "nothing is downloaded.*llama-3-8b"),
        ({"teacher": "llama-2-7b", "student": "llama-3.2-1b"}, "tokenizer"),
        ({"teacher": "llama-2-7b", "seq_len": 4097}, "context of 4096"),
        ({"teacher": "llama-2-7b", "student_layers": 33}, "32 layers, got 33"),
    ],
)
def test_pair_configs_refuses(make_settings, values, message):
    with pytest.raises(PlanError, match=message):
        pair_configs(make_settings(**values))


def test_pair_configs_of_presets(make_settings):
    teacher, student, notes = pair_configs(make_settings())
    assert (teacher.num_layers, student.num_layers, notes) == (30, 10, [])
    teacher, student, notes = pair_configs(
        make_settings(teacher="qwen2-72b", student="qwen2-1.5b")
    )
    assert (teacher.padded_vocab_size, student.padded_vocab_size) == (152064, 151936)
    assert teacher.vocab_size == student.vocab_size == 151936
    assert len(notes) == 1
    assert "padding" in notes[-1]


def test_pair_configs_of_some_layers_keeps_what_differs_between_them(make_settings):
    for name in PRESETS:
        _, student, _ = pair_configs(make_settings(teacher=name, student_layers=3))
        assert student.num_layers == 3
        assert len(student.window_layers or "123") == 3


def test_pair_configs_of_resized_models_have_the_teachers_vocabulary(make_settings):
    teacher, student, _ = pair_configs(
        make_settings(
            teacher="phi-3-mini", student="pythia-410m", resize_embeddings=True
        )
    )
    assert teacher.vocab_size == student.vocab_size == 32064


@pytest.mark.tpu_compiler
def test_make_plan_of_a_tpu(make_run, tmp_path, quiet):
    pytest.importorskip("libtpu", reason="compiles for a TPU")
    mesh = "data=2,fsdp=2,tensor=2"
    settings = make_run(tmp_path / "out", mesh=mesh, dtype="bfloat16")
    plan = make_plan(settings, "v5e:2x4", quiet)
    assert plan.fits
    assert plan.chips == 8
    assert plan.binds in plan.seconds
    assert plan.step_seconds_lower_bound == max(plan.seconds.values()) > 0
    assert plan.collectives.count["all-gather"] > 0
