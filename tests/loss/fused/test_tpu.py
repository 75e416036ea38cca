"""The fused head as the TPU compiler makes it, without a TPU."""

import pytest

from taid_jax.plan import count_collectives

pytest.importorskip("libtpu", reason="the TPU compiler comes with the `tpu` extra")
pytestmark = [pytest.mark.tpu_compiler, pytest.mark.optimised]

TOKENS, STUDENT = 8192, 2048
"""As `compile_step` has them."""


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
