"""How activations and weights lie on the devices in the compiled step."""

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.optimised

ROOT = pathlib.Path(__file__).parents[2]
LENGTH = 40


def _shapes(text, kind):
    """The shapes of the floating-point results of a kind of instruction."""
    found = re.findall(rf"= ([^=]*?) {kind}(?:-start)?\(", text)
    arrays = [array for one in found for array in re.findall(r"f\d+\[([\d,]*)\]", one)]
    return [tuple(int(n) for n in array.split(",") if n) for array in arrays]


@pytest.mark.slow
@pytest.mark.multidevice
def test_train_step_gathers_weights_and_never_activations(tiny, make_settings):
    from taid_jax.plan.compiled import abstract_step, plan_mesh
    from taid_jax.plan.machine import find_machine

    settings = make_settings(batch_size=16, seq_len=LENGTH)
    mesh = plan_mesh("data=2,fsdp=2,tensor=2", find_machine("local:8"))
    step, arguments = abstract_step(settings, *tiny, mesh)
    text = step.lower(*arguments).compile().as_text()
    gathered = _shapes(text, "all-gather")
    assert gathered
    # No width of the models has the sequences' length as a divisor.
    assert not [shape for shape in gathered if any(n % LENGTH == 0 for n in shape)]
    # What is exchanged of them is a device's share: 4 rows, and parts of their widths.
    for shape in _shapes(text, "all-to-all"):
        assert math.prod(shape) <= 4 * LENGTH * 32


# XLA writes its warnings to standard error, where a variable that has to be set before
# JAX is imported does not keep them back: in a process of its own.
_COUNT = """
import json, sys
from taid_jax.plan import find_machine, pair_configs, plan_step
from taid_jax.settings import from_dict

found = {}
for teacher, student, mesh in json.loads(sys.argv[1]):
    settings = from_dict({
        "teacher": teacher, "batch_size": 8, "seq_len": 64, "remat": "full",
        "dtype": "bfloat16", "mesh": mesh,
        **({"student": student} if student else {"student_layers": 2}),
    })
    models = pair_configs(settings)[:2]
    plan = plan_step(settings, *models, find_machine("local:8"))
    found[f"{teacher} {student} {mesh}"] = plan.rematerializations
print(json.dumps(found))
"""


def _rematerializations(cases):
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        JAX_NUM_CPU_DEVICES="8",
        PYTHONPATH=str(ROOT),
        TF_CPP_MIN_LOG_LEVEL="1",
    )
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _program(config):
    """What of an architecture decides its program, sizes that divide alike left out."""
    sizes = ("padded_vocab_size", "num_heads", "num_kv_heads")
    values = dataclasses.asdict(config)
    alike = {name: values.pop(name) % 2 for name in sizes}
    for name in (
        *("d_model", "num_layers", "head_dim", "mlp_dim", "max_position_embeddings"),
        *("family", "norm_eps", "initializer_range", "vocab_size"),
    ):
        values.pop(name)
    given = {
        name: value is not None if not isinstance(value, bool | str) else value
        for name, value in values.items()
    }
    return tuple(sorted((given | alike).items()))


@pytest.mark.slow
@pytest.mark.multidevice
def test_plan_step_no_array_is_gathered_to_change_its_layout():
    from taid_jax.models.presets import PRESETS

    cases = [
        ["smollm2-135m", None, mesh]
        for mesh in (
            "fsdp=8",
            "data=2,fsdp=4",
            "data=2,fsdp=2,tensor=2",
            "fsdp=4,tensor=2",
            "tensor=8",
        )
    ]
    cases.append(["llama-3-8b", "llama-3.2-1b", "fsdp=4,tensor=2"])
    # Neither depth nor width changes the program: one preset of each kind.
    kinds = {_program(config): name for name, config in PRESETS.items()}
    cases += [[name, None, "data=2,fsdp=2,tensor=2"] for name in kinds.values()]
    found = _rematerializations(cases)
    assert len(found) == len({tuple(case) for case in cases}) > 10
    assert set(found.values()) == {0}, found
