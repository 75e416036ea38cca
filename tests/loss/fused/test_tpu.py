"""The fused head as the TPU compiler makes it, without a TPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taid_jax import loss
from taid_jax.plan import count_collectives
from taid_jax.types import Head

pytest.importorskip("libtpu", reason="the TPU compiler comes with the `tpu` extra")
pytestmark = [pytest.mark.tpu_compiler, pytest.mark.optimised]

TOKENS, STUDENT, TEACHER, VOCAB = 8192, 2048, 4096, 128256


@pytest.fixture
def compile_step():
    """`compile_step(machine, ...)`: mean loss and both gradients, in bfloat16."""
    from taid_jax.plan import find_machine
    from taid_jax.plan.compiled import compiled_anew, plan_mesh

    def compile_step(
        name,
        *,
        tokens=TOKENS,
        mesh=None,
        masked=True,
        chunk_size=None,
        transposed=False,
    ):
        machine = find_machine(name)
        if mesh is None:
            mesh = Mesh([[[machine.devices[0]]]], ("data", "fsdp", "tensor"))
        else:
            mesh = plan_mesh(mesh, machine)

        def shape(layout, *sizes, dtype=jnp.bfloat16):
            where = NamedSharding(mesh, layout)
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

        def mean(hidden, kernel, teacher_hidden, teacher_kernel, mask):
            total, sums = loss.fused_loss(
                loss.TAID(jnp.float32(0.4)),
                hidden,
                Head(kernel, transposed=transposed),
                teacher_hidden,
                Head(teacher_kernel, transposed=transposed),
                mask if masked else None,
                chunk_size=chunk_size,
                mesh=mesh,
            )
            return total / sums["num_tokens"]

        def kernel(*sizes):
            axes = ("fsdp", "tensor")
            if transposed:
                sizes, axes = sizes[::-1], axes[::-1]
            return shape(P(*axes), *sizes)

        rows = P(("data", "fsdp"))
        step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
        lowered = step.lower(
            shape(rows, tokens, STUDENT),
            kernel(STUDENT, VOCAB),
            shape(rows, tokens, TEACHER),
            kernel(TEACHER, VOCAB),
            shape(rows, tokens, dtype=jnp.float32),
        )
        with compiled_anew():
            return lowered.compile()

    return compile_step


@pytest.mark.parametrize("machine", ["v5p:2x2x1", "v6e:1x1"])
@pytest.mark.parametrize(
    ("masked", "transposed"), [(True, False), (False, False), (True, True)]
)
def test_fused_loss_on_a_chip(compile_step, machine, masked, transposed):
    compiled = compile_step(machine, masked=masked, transposed=transposed)
    # The gradient of the head in float32 alone is 1.0 GiB of it.
    assert compiled.memory_analysis().temp_size_in_bytes < 2.6 * 2**30


@pytest.mark.parametrize("transposed", [False, True], ids=["kernel", "table"])
@pytest.mark.parametrize("machine", ["v5p:2x2x2", "v6e:2x4"])
def test_fused_loss_on_eight_chips(compile_step, machine, transposed):
    mesh = "data=2,fsdp=2,tensor=2"
    # 2048 tokens on a chip and its neighbour: 2 chunks; then 4.
    programs = [
        compile_step(
            machine, tokens=tokens, mesh=mesh, chunk_size=1024, transposed=transposed
        )
        for tokens in (TOKENS, 2 * TOKENS)
    ]
    few, many = (count_collectives(program.as_text()) for program in programs)
    # Heads gathered and the head's gradient reduced once, however many tokens there
    # are; of each token its gradient in float32, behind the loop, and some sums in it.
    more = many.total_bytes - few.total_bytes
    assert few.endless == many.endless == 0
    assert 0 <= more <= TOKENS // 4 * (4 * STUDENT + 64)
    # Both heads gathered over fsdp, in bfloat16, and half of the head's gradient are
    # 1.2 GiB of it.
    for program in programs:
        assert program.memory_analysis().temp_size_in_bytes < 2.6 * 2**30
