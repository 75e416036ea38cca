import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from taid_jax.plan import count_collectives, find_machine
from taid_jax.plan.compiled import plan_mesh

pytestmark = pytest.mark.optimised


def test_count_collectives_multiplies_by_the_trips_of_nested_loops():
    mesh = plan_mesh("fsdp=8", find_machine("local:8"))
    rows = jax.NamedSharding(mesh, PartitionSpec("fsdp"))

    def inner(x, _):
        return jax.lax.psum(x, "fsdp") / 8, None

    def outer(x, _):
        return jax.lax.scan(inner, x, length=5)[0], None

    def program(x):
        return jax.lax.scan(outer, x, length=3)[0]

    spec = PartitionSpec("fsdp")
    program = jax.shard_map(
        program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    x = jax.ShapeDtypeStruct((8, 100), jnp.float32, sharding=rows)
    found = count_collectives(jax.jit(program).lower(x).compile().as_text())
    assert found.count == {"all-reduce": 15}
    assert found.bytes == {"all-reduce": 15 * 100 * 4}
    # A sum on a ring of eight sends 7/8 twice.
    np.testing.assert_allclose(found.sent, 15 * 400 * 2 * 7 / 8)


TPU_PROGRAM = """\
HloModule jit_step

%body.1 (p: (s32[], bf16[8,256])) -> (s32[], bf16[8,256]) {
  %p = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %ag.2 = bf16[32,256]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=[4,4]<=[16]
  %ar.2 = bf16[8,256]{1,0:T(8,128)(2,1)} all-reduce(%x), replica_groups=mesh['a'=2,'b'=8] {'b'}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)}) tuple(%i, %ar.2)
}

%condition.1 (p.2: (s32[], bf16[8,256])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
  %p.2 = (s32[]{:T(128)}, bf16[8,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.2, %bound), direction=LT
}

ENTRY %main (x.1: bf16[8,256]) -> bf16[8,256] {
  %x.1 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %cp = (bf16[8,256]{1,0}, bf16[8,256]{1,0}, u32[]{:S(2)}) collective-permute-start(%x.1), source_target_pairs={{0,1},{1,0}}
  %cp.done = bf16[8,256]{1,0} collective-permute-done(%cp)
  %loop = (s32[], bf16[8,256]) while(%tuple), condition=%condition.1, body=%body.1
  ROOT %out = bf16[8,256] get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_count_collectives_reads_the_way_of_tpu_programs():
    found = count_collectives(TPU_PROGRAM)
    assert found.count == {"all-gather": 7, "all-reduce": 7, "collective-permute": 1}
    small, large = 8 * 256 * 2, 32 * 256 * 2
    assert found.bytes["all-gather"] == 7 * large
    assert found.bytes["all-reduce"] == 7 * small
    # The start's type also holds two flags of four bytes.
    assert found.bytes["collective-permute"] - small in range(9)
    sent = 7 * large * 3 / 4 + 7 * small * 2 * 7 / 8 + small
    np.testing.assert_allclose(found.sent, sent, rtol=1e-3)
    assert found.endless == 0


def test_count_collectives_counts_one_that_spans_fusions_once():
    gather = "  ROOT %g = bf16[32,256] all-gather(%x), channel_id={}\n"
    fusions = "".join(
        f"%f.{name} (x: bf16[8,256]) -> bf16[32,256] {{\n"
        f"  %x = bf16[8,256] parameter(0)\n{gather.format(channel)}}}\n\n"
        for name, channel in (("start", 5), ("middle", 5), ("end", 5), ("other", 6))
    )
    calls = "".join(
        f"  %{name} = bf16[32,256] fusion(%x), kind=kCustom, calls=%f.{name}\n"
        for name in ("start", "middle", "end", "other")
    )
    loop = "  ROOT %t = (s32[]{:T(128)}"
    found = count_collectives(fusions + TPU_PROGRAM.replace(loop, calls + loop))
    assert found.count["all-gather"] == 7 + 2 * 7


def test_count_collectives_names_loops_without_a_fixed_length():
    text = TPU_PROGRAM.replace("constant(7)", "get-tuple-element(%p.2)")
    found = count_collectives(text)
    assert found.endless == 1
    assert found.count["all-gather"] == 1


def test_count_collectives_of_loops_that_take_two_steps_a_turn():
    turned = (
        "  %i = s32[]{:T(128)} get-tuple-element(%p), index=0\n"
        "  %two = s32[]{:T(128)} constant(2)\n"
        "  %next = s32[]{:T(128)} add(%i, %two)\n"
    )
    text = TPU_PROGRAM.replace("  %x = bf16", turned + "  %x = bf16", 1)
    text = text.replace("tuple(%i, %ar.2)", "tuple(%next, %ar.2)")
    # 0, 2, 4 and 6 are below 7.
    assert count_collectives(text).count["all-gather"] == 4

    begun = (
        "  %three = s32[]{:T(128)} constant(3)\n"
        "  %copied = s32[]{:T(128)} copy(%three)\n"
        "  %tuple = (s32[], bf16[8,256]) tuple(%copied, %x.1)\n"
    )
    text = text.replace("  %loop =", begun + "  %loop =")
    # 3 and 5.
    found = count_collectives(text)
    assert found.count["all-gather"] == 2
    assert found.endless == 0


@pytest.mark.parametrize(
    ("operation", "links", "network"),
    [
        # 8 devices, 4 of them joined by links. All eight: 3/4 of it goes by links, and
        # each of four sends half of its quarter over the network.
        ("all-gather(%x), replica_groups=[1,8]<=[8]", 3 / 4, 1 / 8),
        ("all-gather(%x), replica_groups={}", 1, 1 / 4),
        ("all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}", 6 / 4, 2 / 8),
        # Neighbours, all on one host, and pairs, one on each of two hosts.
        ("all-gather(%x), replica_groups=[2,4]<=[8]", 3 / 4, 0),
        ("all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0)", 0, 1 / 2),
        ("all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a'}", 0, 1 / 2),
        ("all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}", 3 / 4, 0),
        ("all-to-all(%x), replica_groups={{0,1,4,5}}", 1 / 4, 2 / 4),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 1, 0),
        ("collective-permute(%x), source_target_pairs={{0,4},{4,0}}", 0, 1),
    ],
)
def test_count_collectives_tells_links_from_the_network(operation, links, network):
    text = f"""\
ENTRY %main (x: bf16[64]) -> bf16[64] {{
  %x = bf16[64]{{0}} parameter(0)
  ROOT %y = bf16[64]{{0}} {operation}
}}
"""
    found = count_collectives(text, 4)
    assert (found.sent, found.sent_network) == (128 * links, 128 * network)
    assert count_collectives(text).sent_network == 0
