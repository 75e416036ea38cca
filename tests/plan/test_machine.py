import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from taid_jax.plan import PlanError, find_machine


@pytest.mark.parametrize(
    "name",
    [
        *("v5e:3x3", "v7:2x2", "v5p:2x2", "local:0", "local", "", "v4"),
        *("h100:9", "h100:0x8", "h100", "h100:8x8x8", "gb200:8", "b200:99999x8"),
    ],
)
def test_find_machine_unknown_lists_the_known(name):
    with pytest.raises(
        PlanError, match=r"no machine is called.*v5e.*8x8.*h100.*HOSTSxN.*local:N"
    ):
        find_machine(name)


def test_find_machine_more_local_devices_than_there_are():
    jax.devices()  # Once counted they are what they are.
    with pytest.raises(PlanError, match="JAX_NUM_CPU_DEVICES=9"):
        find_machine("local:9")


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    "name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
)
def test_find_machine_limit_is_the_compilers(name):
    pytest.importorskip("libtpu", reason="compiles for a TPU")
    machine = find_machine(name)
    assert len(machine.devices) == (8 if name.startswith("tpu7x") else 4)
    mesh = jax.sharding.Mesh(np.array(machine.devices), ("all",))
    whole = jax.NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((2**36,), jnp.float32, sharding=whole)
    limit = rf"{machine.hbm_bytes / 2**30:.2f}G"
    with pytest.raises(jax.errors.JaxRuntimeError, match=limit):
        jax.jit(lambda x: jnp.sin(x)).lower(x).compile()
