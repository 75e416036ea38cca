"""Whether models fit in memory: told with the sizes, before anything is made."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from taid_jax.errors import ModelError
from taid_jax.models import memory
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params, param_axes
from taid_jax.models.families import write_config
from taid_jax.models.files.export import export_model
from taid_jax.models.files.load import load_model, random_init
from taid_jax.models.memory import check_fits, params_need
from taid_jax.sharding import make_mesh, tree_shardings

SMALL = DecoderConfig(
    vocab_size=16,
    d_model=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=8,
    max_position_embeddings=32,
)
HUGE = dataclasses.replace(
    SMALL, d_model=2**20, num_layers=100, mlp_dim=2**22, head_dim=2**19
)


def size(config):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def test_params_need_counts_every_device_by_what_it_holds():
    plain = params_need("x", SMALL, "float32", None)
    assert plain.bytes == {jax.devices()[0]: 4 * size(SMALL)}
    half = params_need("x", SMALL, "bfloat16", SingleDeviceSharding(jax.devices()[0]))
    assert half.bytes == {jax.devices()[0]: 2 * size(SMALL)}
    thrice = params_need("x", SMALL, "float32", None, copies=3)
    assert thrice.bytes.total() == 3 * plain.bytes.total()


@pytest.mark.multidevice
def test_params_need_counts_shares_and_copies_on_a_mesh():
    mesh = make_mesh("data=2,fsdp=4,tensor=1")
    where = tree_shardings(param_axes(SMALL), abstract_params(SMALL), mesh)
    need = params_need("x", SMALL, "float32", where)
    parts = jax.tree.map(
        lambda leaf, sharding: 4 * math.prod(sharding.shard_shape(leaf.shape)),
        abstract_params(SMALL),
        where,
    )
    assert set(need.bytes.values()) == {sum(jax.tree.leaves(parts))}
    everywhere = NamedSharding(Mesh(jax.devices(), ("x",)), PartitionSpec())
    copied = params_need("x", SMALL, "float32", everywhere)
    assert copied.bytes.total() == 8 * 4 * size(SMALL)


def test_random_init_refuses_at_once_what_no_machine_holds(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config(HUGE)))
    with pytest.raises(ModelError, match=r"not enough memory: need .*GiB") as caught:
        random_init(tmp_path, jax.random.key(0))
    assert f"{4 * size(HUGE) / 2**30:,.2f} GiB" in str(caught.value)


def test_load_model_refuses_files_that_are_larger_than_memory(
    tmp_path, monkeypatch, random_params
):
    export_model(tmp_path / "m", SMALL, random_params(SMALL))
    monkeypatch.setattr(memory, "host_memory", lambda: 4 * size(SMALL) - 1)
    with pytest.raises(ModelError, match="not enough memory"):
        load_model(tmp_path / "m")
    # What fits exactly is not refused.
    load_model(tmp_path / "m", dtype="bfloat16")
    monkeypatch.setattr(memory, "host_memory", lambda: 4 * size(SMALL))
    load_model(tmp_path / "m")


PEAK = """
import pathlib, sys
import jax
from taid_jax.models.files.load import load_model

def resident(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

load_model(sys.argv[1])  # what the code itself needs is there now
before = resident("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
model = load_model(sys.argv[2])
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
print((resident("VmHWM") - before) * 1024 / weights)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_load_model_needs_no_second_copy(tmp_path, random_params):
    large = dataclasses.replace(SMALL, d_model=512, num_layers=16, mlp_dim=2048)
    for name, config in (("small", SMALL), ("large", large)):
        export_model(tmp_path / name, config, random_params(config))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    # The weights, 200 MiB, and what one layer of them takes.
    assert 1 <= float(done.stdout) < 1.5


def test_check_fits_adds_up_what_shares_a_host(monkeypatch):
    needs = [params_need(name, SMALL, "float32", None) for name in ("one", "two")]
    monkeypatch.setattr(memory, "host_memory", lambda: 6 * size(SMALL))
    check_fits(needs[0])
    with pytest.raises(ModelError, match=r"GiB for one, .* GiB for two; this host has"):
        check_fits(*needs)


def test_check_fits_asks_each_device_that_has_memory_of_its_own():
    class Chip:
        platform = "gpu"

        def __init__(self, name, stats):
            self.name, self.stats = name, stats

        def __repr__(self):
            return self.name

        def memory_stats(self):
            return self.stats

    small = Chip("chip 0", {"bytes_limit": 100, "bytes_in_use": 60})
    silent = Chip("chip 1", None)
    check_fits(memory.Need("x", memory.Counter({small: 40, silent: 10**15})))
    with pytest.raises(ModelError, match=r"chip 0 has 0\.00 GiB"):
        check_fits(memory.Need("x", memory.Counter({small: 41})))
