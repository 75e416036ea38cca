import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from taid_jax.models.attention import Scoring
from taid_jax.models.kernels import splash_attention
from taid_jax.plan import count_flops, find_machine
from taid_jax.plan.compiled import plan_mesh


def test_count_flops_of_scan_cond_and_shard_map():
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


@pytest.mark.parametrize(
    ("window", "blocks"),
    [
        # Of eight by eight blocks of 512, those below the diagonal or on it.
        (None, 36),
        # Each of eight rows of blocks has up to three in reach: those that begin the
        # sequence have fewer, which is not seen in the grid.
        (1024, 24),
    ],
)
def test_count_flops_of_a_kernel_counts_the_blocks_it_runs(window, blocks):
    def attend(queries, keys, values):
        return splash_attention(
            queries, keys, values, None, window=window, scoring=Scoring(0.125)
        )

    queries = jax.ShapeDtypeStruct((3, 2, 5, 4096, 64), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((3, 2, 4096, 64), jnp.bfloat16)
    found = count_flops(jax.make_jaxpr(attend)(queries, keys, keys))
    # Two products for each of 3 x 2 x 5 heads.
    assert found == 30 * blocks * 2 * 2 * 512 * 512 * 64
