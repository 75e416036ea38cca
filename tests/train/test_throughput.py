import json

import jax
import numpy as np
import pytest

from taid_jax.chips import peak_flops
from taid_jax.models.families import write_config
from taid_jax.models.flops import forward_flops
from taid_jax.models.presets import preset
from taid_jax.plan import count_flops, find_machine, pair_configs, plan_step
from taid_jax.plan.compiled import abstract_step
from taid_jax.settings import from_dict
from taid_jax.sharding import make_mesh
from taid_jax.store import format as f
from taid_jax.train import throughput as tp


@pytest.mark.parametrize(
    "values",
    [
        {"remat": "full", "grad_accum": 2},
        {"fused": False},
        {"teacher": ["smollm2-135m-instruct"] * 2, "teacher_mean": "geometric"},
        {"fused": False, "teacher_prompt": "{prompt}", "teacher_seq_len": 512},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
    ],
)
def test_step_flops_are_those_of_the_program(values):
    settings = from_dict({"batch_size": 4, "seq_len": 256} | values)
    teacher, student, _ = pair_configs(settings)
    teachers = teacher if isinstance(teacher, list) else [teacher]
    mesh = make_mesh("data=1", jax.devices()[:1])
    step, arguments = abstract_step(settings, teacher, student, mesh)
    program = count_flops(step.trace(*arguments).jaxpr)

    throughput = tp.make_throughput(settings, student, teachers, mesh)
    counted = 4.0 * 256
    found = throughput.flops.total(counted) + throughput.flops.repeated
    # The program's four blocks of queries cover five eighths of the attention's square,
    # where the half is counted: a quarter more than 3.5 passes of the student (4.5
    # where they are repeated) and one of the teacher.
    passes = 3.5 if settings.model.remat == "none" else 4.5
    attention = passes * forward_flops(student, 4, 256).attention
    length = settings.data.teacher_len or 256
    attention += sum(forward_flops(each, 4, length).attention for each in teachers)
    # What is left: sums over positions that RoPE and the norms write as products.
    np.testing.assert_allclose(found + attention / 4, program, rtol=2e-3)
    # And so without any correction, by less than the 1.5% that are promised.
    np.testing.assert_allclose(found, program, rtol=0.015)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_step_without_a_teacher_has_none_of_its_products(kind, tmp_path):
    settings = from_dict({"batch_size": 2, "seq_len": 64, "student": "smollm2-135m"})
    teacher, student, _ = pair_configs(settings)
    _write_store(tmp_path, teacher, kind)
    stored = from_dict(
        {"batch_size": 2, "seq_len": 64, "student": "smollm2-135m"}
        | {"teacher_store": str(tmp_path)}
    )
    mesh = make_mesh("data=1", jax.devices()[:1])
    live, found = (
        count_flops(step.trace(*arguments).jaxpr)
        for step, arguments in (
            abstract_step(each, teacher, student, mesh) for each in (settings, stored)
        )
    )
    part = forward_flops(teacher, 2, 64)
    gone = part.projections + part.attention + (kind == "topk") * part.head
    # One block covers the attention's whole square, of which the half is counted. What
    # is left: sums over positions that RoPE and the norms write as products.
    np.testing.assert_allclose(live - found, gone + part.attention, rtol=2e-3)
    counted = tp.make_throughput(settings, student, [teacher], mesh).flops.total(128.0)
    without = tp.make_throughput(stored, student, [teacher], mesh, stored=[kind])
    assert counted - without.flops.total(128.0) == gone


def _write_store(folder, teacher, kind):
    """As much of a store as a plan looks at."""
    columns = f.hidden_columns(teacher.d_model, "bfloat16")
    if kind == "topk":
        columns = f.topk_columns(64, teacher.vocab_size)
    manifest = f.Manifest(
        kind=kind,
        columns=columns,
        vocab_size=teacher.vocab_size,
        teacher="",
        tokenizer="",
        source="a teacher",
        examples=0,
        tokens=0,
        shards=(),
        others=(),
        made={},
    )
    f.write_manifest(folder, manifest)
    (folder / f.TEACHER).mkdir()
    (folder / f.TEACHER / "config.json").write_text(json.dumps(write_config(teacher)))


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_a_72b_teachers_hidden_states_train_a_student_where_it_does_not_fit(tmp_path):
    pytest.importorskip("libtpu", reason="compiles for a TPU")
    _write_store(tmp_path, preset("qwen2-72b"), "hidden")
    values = {"student": "qwen2-1.5b", "dtype": "bfloat16", "remat": "full"}
    values |= {"batch_size": 8, "seq_len": 2048}
    for teacher, fits in (
        ({"teacher_store": str(tmp_path)}, True),
        ({"teacher": "qwen2-72b"}, False),
    ):
        settings = from_dict(values | teacher)
        known, student, _ = pair_configs(settings)
        assert plan_step(settings, known, student, find_machine("v5e:2x4")).fits == fits


def test_step_flops_of_a_teacher_that_is_not_used():
    student, teacher = preset("llama-3.2-1b"), preset("llama-3-8b")
    with_it = tp.step_flops(student, teacher, batch=2, length=64)
    without = tp.step_flops(student, teacher, batch=2, length=64, teacher_used=False)
    part = forward_flops(teacher, 2, 64)
    assert with_it.total(128.0) - without.total(128.0) == sum(part)
    # Tokens that do not count cost their layers alone.
    layers = part.projections + part.attention
    assert with_it.total(0.0) - without.total(0.0) == layers


def test_peak_flops_of_known_devices():
    known = {"TPU v5 lite": 197e12, "TPU v5": 459e12, "NVIDIA H200": 989e12}
    known |= {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L4": 121e12}
    known |= {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA GB200": 2500e12}
    for kind, peak in (known | dict.fromkeys(["NVIDIA L40", "TPU v9", "cpu"])).items():
        assert peak_flops(kind) == peak, kind


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    "name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
)
def test_peak_flops_knows_what_the_compiler_calls_a_chip(name):
    pytest.importorskip("libtpu", reason="compiles for a TPU")
    machine = find_machine(name)
    assert peak_flops(machine.devices[0].device_kind) == machine.chip.flops


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(tp, "time", clock)
    return clock


def test_throughput_shares_the_time_out(clock):
    flops = tp.StepFlops(
        student=60, teacher=20, student_head=3, teacher_head=1, repeated=7
    )
    throughput = tp.Throughput(flops, chips=2, peak=100.0)

    def spend(part, seconds):
        with throughput.measured(part):
            clock.now += seconds

    spend("evaluate", 1000)
    throughput.start()
    for _ in range(2):
        spend("data", 1)
        spend("dispatch", 0.5)
        spend("wait", 6)
        clock.now += 0.5
        throughput.count(5.0)
    spend("save", 30)
    spend("evaluate", 40)
    found = throughput.take(2, 16)
    assert found == {
        "tokens_per_second": 2.0,
        "tokens_per_second_per_chip": 1.0,
        "step_seconds": 8.0,
        "data_seconds": 1.0,
        "generate_seconds": 0.0,
        "learn_seconds": 6.5,
        "dispatch_seconds": 0.5,
        "host_seconds": 1.5,
        "save_seconds": 30.0,
        # 80 and 5 counted tokens of 4, in 8 seconds on 2 chips.
        "flops_per_second_per_chip": 100 / 8 / 2,
        "mfu": 100 / 8 / 2 / 100,
    }
    assert set(found) == set(tp.MEASURED)
    spend("save", 2)
    report = throughput.summary([])
    assert (report["save_seconds"], report["evaluate_seconds"]) == (32.0, 1040.0)
    clock.now += 1
    assert throughput.take(1, 16)["tokens_per_second"] == 16


def test_throughput_of_unknown_chips_gives_operations_without_mfu():
    settings = from_dict({})
    mesh = make_mesh("data=8")
    teacher, student, _ = pair_configs(settings)
    throughput = tp.make_throughput(settings, student, [teacher], mesh)
    throughput.count(1024.0)
    row = throughput.take(1, 1024)
    assert row["mfu"] is None
    assert row["flops_per_second_per_chip"] > 0
    report = throughput.summary([row | {"tokens": 1024}])
    assert report["mfu"] is report["peak_flops_per_chip"] is None
    assert report["chips"] == 8
    total = throughput.flops.total(1024.0)
    assert report["student_flops"] + report["teacher_flops"] == total
    assert report["student_flops"] > report["teacher_flops"] > 0
