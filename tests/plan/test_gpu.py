import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from taid_jax.loss import TAID
from taid_jax.models.decoder import decoder_functions
from taid_jax.models.generation import generate, prepare
from taid_jax.plan import (
    GPUS,
    PlanError,
    find_machine,
    make_plan,
    pair_configs,
    plan_step,
)
from taid_jax.plan.compiled import abstract_step, compiled_anew, plan_mesh
from taid_jax.plan.gpu import usable_share
from taid_jax.sharding import activations_on
from taid_jax.store.outputs import topk_outputs
from taid_jax.train.evaluate import make_eval_step

pytestmark = pytest.mark.optimised

PLUGIN = "jax_plugins.xla_cuda13"


def need(module):
    pytest.importorskip(module, reason=f"no compiler for this machine: no {module}")


def test_find_machine_without_the_gpu_compiler_says_how_to_install_it():
    if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(PLUGIN):
        pytest.skip("jax[cuda13] is installed")
    with pytest.raises(PlanError, match=r"pip install 'taid-jax\[cuda\]'"):
        find_machine("h100:8")


def test_usable_share_is_what_the_environment_says():
    assert usable_share({}) == 0.75
    assert usable_share({"XLA_CLIENT_MEM_FRACTION": ".9"}) == 0.9
    for text in ("0", "1.5", "nan", "all"):
        with pytest.raises(ValueError, match="MEM_FRACTION"):
            usable_share({"XLA_CLIENT_MEM_FRACTION": text})


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("name", GPUS)
def test_find_machine_of_gpus(name, monkeypatch):
    need(PLUGIN)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    machine = find_machine(f"{name}:2x4")
    assert len(machine.devices) == 8
    assert machine.devices[0].platform == "gpu"
    assert machine.devices[0].device_kind.startswith(machine.chip.kinds)
    # The trays of a GB200 are joined.
    assert machine.linked == (None if name == "gb200" else 4)
    assert machine.hbm_bytes == machine.chip.hbm_bytes // 2


MACHINES = pytest.mark.parametrize(
    ("machine", "module"),
    [
        pytest.param("h100:8", PLUGIN, marks=pytest.mark.gpu_compiler),
        pytest.param("v5e:2x4", "libtpu", marks=pytest.mark.tpu_compiler),
    ],
)


def stays_on_the_device(text):
    """Whether a program has no float64, and nothing that goes to the host."""
    host = r"infeed|outfeed|is_host_transfer|callback|MoveToHost|S\(5\)"
    return not re.findall(rf"\bf64\[|{host}", text)


@pytest.fixture(scope="module")
def lower_step(make_settings, tiny):
    """Gives mesh, lowered step and shapes of its arguments."""

    def lower(machine):
        settings = make_settings(dtype="bfloat16", mesh="data=2,fsdp=4")
        mesh = plan_mesh(settings.run.mesh, find_machine(machine))
        step, arguments = abstract_step(settings, *tiny, mesh)
        return mesh, step.lower(*arguments), arguments

    return lower


@MACHINES
def test_step_gives_its_state_back_in_place_and_stays_on_the_device(
    lower_step, machine, module
):
    need(module)
    _, lowered, arguments = lower_step(machine)
    with compiled_anew():
        compiled = lowered.compile()
    state = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arguments[0])
    )
    aliased = compiled.memory_analysis().alias_size_in_bytes
    # A TPU's arrays are padded to whole tiles.
    assert aliased == state if module == PLUGIN else aliased >= state
    assert stays_on_the_device(compiled.as_text())


@MACHINES
@pytest.mark.parametrize("what", ["evaluation", "store", "generation"])
def test_programs_beside_the_step_stay_on_the_device(
    lower_step, tiny, machine, module, what
):
    need(module)
    mesh, _, (state, teacher_params, batch) = lower_step(machine)
    dtype = jnp.bfloat16
    teacher, student = (decoder_functions(config, dtype=dtype) for config in tiny)
    if what == "evaluation":
        step = make_eval_step(
            student, teacher, lambda schedule, *_: TAID(schedule.t), mesh=mesh
        )
        lowered = step.lower(state, teacher_params, batch)
    elif what == "store":
        outputs = topk_outputs(teacher, tiny[0].vocab_size, 8)[1]

        @jax.jit
        def run(params, batch):
            with activations_on(mesh):
                return outputs(params, batch)

        lowered = run.lower(teacher_params, batch)
    else:

        @jax.jit
        def run(params, ids, mask):
            settings = {"max_new_tokens": 8, "eos_token_ids": (1,), "pad_token_id": 0}
            params = prepare(params, tiny[0], unroll=False)
            return generate(params, tiny[0], ids, mask, dtype=dtype, **settings)

        ids = batch["input_ids"]
        lowered = run.lower(teacher_params, ids, ids)
    with compiled_anew():
        assert stays_on_the_device(lowered.compile().as_text())


@pytest.mark.gpu_compiler
def test_make_plan_of_gpus(make_run, tmp_path, quiet):
    need(PLUGIN)
    settings = make_run(tmp_path / "out", mesh="data=2,fsdp=4", dtype="bfloat16")
    plan = make_plan(settings, "h100:2x4", quiet)
    assert plan.fits
    assert plan.chips == 8
    assert plan.rematerializations == 0
    # Gathered within a host, weights of three layers forward, of two once more and
    # backward; summed over hosts, where nothing else passes.
    assert plan.collectives.count["all-gather"] >= 3 + 2 * 2
    assert plan.collectives.count["all-reduce"] > 0
    assert plan.collectives.endless == 0
    assert 0 < plan.collectives.sent_network < plan.collectives.sent
    assert plan.seconds.keys() == {"flops", "hbm", "interconnect", "network"}
    assert all(part.bytes for part in plan.parts.values())
    text = (tmp_path / "out" / "plan.json").read_text()
    assert "XLA_CLIENT_MEM_FRACTION" in text


@pytest.mark.gpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "teacher", "student", "batch_size", "most_gib"),
    [
        # The paper's pairs, and a large one: 8,192 and 4,096 tokens of each GPU.
        ("h100:8", "phi-3-mini", "tinyllama-1.1b", 32, 8),
        ("h100:8", "llama-2-7b", "tinyllama-1.1b", 32, 8),
        ("h100:8", "stablelm-zephyr-3b", "pythia-1.4b", 32, 8),
        ("h100:8x8", "qwen2-72b", "qwen2-1.5b", 128, 10),
    ],
)
def test_plan_step_of_presets_fits_gpus(
    make_settings, machine, teacher, student, batch_size, most_gib
):
    need(PLUGIN)
    settings = make_settings(
        teacher=teacher,
        student=student,
        resize_embeddings=not teacher.startswith("qwen2"),
        batch_size=batch_size,
        seq_len=2048,
        dtype="bfloat16",
    )
    plan = plan_step(settings, *pair_configs(settings)[:2], find_machine(machine))
    assert plan.fits
    assert plan.peak_bytes <= most_gib * 2**30
    assert plan.rematerializations == 0
    assert plan.parts["teacher"].flops > plan.parts["student forward"].flops
