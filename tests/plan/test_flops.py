import jax
import numpy as np
from jax.sharding import PartitionSpec


def test_count_flops_of_scan_cond_and_shard_map():
    from taid_jax.plan import count_flops, find_machine
    from taid_jax.plan.compiled import plan_mesh

    mesh = plan_mesh("fsdp=8", find_machine("local:8"))

    def program(x, w):
        def body(x, _):
            return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x), None

        return jax.lax.scan(body, x, length=6)[0]

    rows, whole = PartitionSpec("fsdp"), PartitionSpec()
    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=(rows, whole), out_specs=rows, check_vma=False
    )
    x, w = np.ones((16, 4), np.float32), np.ones((4, 4), np.float32)
    for function in (program, mapped, jax.jit(mapped)):
        assert count_flops(jax.make_jaxpr(function)(x, w)) == 6 * 2 * 16 * 4 * 4
