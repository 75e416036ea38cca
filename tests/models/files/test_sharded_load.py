"""How much memory a process needs for its share of a large model: really measured."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[3]
MIB = 1 << 20
PROCESSES, DEVICES = 4, 8

# Prints what the loading of a model added to the most memory that was ever resident.
LOAD = """
import json, pathlib, sys
from taid_jax import distributed
from taid_jax.models.decoder import abstract_params, param_axes
from taid_jax.models.files.load import load_model
from taid_jax.settings import DistributedSettings
from taid_jax.sharding import make_mesh, tree_shardings
import jax

small, large, where, count, number = sys.argv[1:]
distributed.initialize(DistributedSettings(coordinator=where, num_processes=int(count),
                        process_id=int(number), join_timeout=120))
mesh = make_mesh("fsdp=4,tensor=2")

def shardings(config):
    return tree_shardings(param_axes(config), abstract_params(config), mesh)

def resident(key):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024

load_model(small, shardings=shardings)  # what the code itself needs is there now
before = resident("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
model = load_model(large, shardings=shardings)
added = resident("VmHWM") - before
leaves = jax.tree.leaves(model.params)
share = sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards)
distributed.shutdown()
print(json.dumps({"added": added, "share": share}))
"""


@pytest.fixture
def write_model(tmp_path):
    """A function: a Llama folder of a shape with random weights."""
    import jax

    from taid_jax.models.config import DecoderConfig
    from taid_jax.models.decoder import abstract_params
    from taid_jax.models.files.load import export_model

    def write(name, **shape):
        config = DecoderConfig(**shape, max_position_embeddings=64)
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: jax.device_put(rng.random(leaf.shape, np.float32)),
            abstract_params(config),
        )
        export_model(tmp_path / name, config, params, max_shard_bytes=256 * MIB)
        return tmp_path / name

    return write


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_load_model_holds_its_share_and_one_tensor(write_model):
    common = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 128, "d_model": 1024}
    small = write_model("small", vocab_size=64, num_layers=1, mlp_dim=64, **common)
    large = write_model(
        "large", vocab_size=32768, num_layers=12, mlp_dim=4096, **common
    )
    total = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert total >= 1024 * MIB
    largest = 32768 * 1024 * 4
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        JAX_NUM_CPU_DEVICES=str(DEVICES // PROCESSES),
        PYTHONPATH=str(ROOT),
    )
    command = [sys.executable, "-c", LOAD, str(small), str(large), where]
    started = [
        subprocess.Popen(
            [*command, str(PROCESSES), str(number)],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for number in range(PROCESSES)
    ]
    for process in started:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0
        found = json.loads(output.splitlines()[-1])
        print({key: round(value / MIB) for key, value in found.items()})
        # An eighth of every matrix on each device; the norms are whole on each.
        assert found["share"] == pytest.approx(total / PROCESSES, rel=0.01)
        # 16 MiB: the headers of the files, and what the allocator keeps.
        assert found["added"] <= found["share"] + largest + 16 * MIB
