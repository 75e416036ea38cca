"""The fused head on eight devices against the plain form on one."""

import functools

import jax
import jax.numpy as jnp
import pytest

from taid_jax import loss
from taid_jax.sharding import make_mesh
from taid_jax.types import Head

pytestmark = pytest.mark.optimised

STUDENT, TEACHER = 16, 24
"""As `arrays` makes them."""

OBJECTIVES = {
    "taid": lambda: loss.TAID(jnp.float32(0.3)),
    "dkd": loss.DKD,
    "adaptive_kl": loss.AdaptiveKL,
}


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("data=8", "dkd"),
        ("fsdp=8", "adaptive_kl"),
        ("data=2,fsdp=2,tensor=2", "taid"),
        ("data=2,fsdp=2,tensor=2", "dkd"),
        ("data=2,tensor=4", "adaptive_kl"),
    ],
)
def test_fused_loss_eight_devices_equal_one(
    arrays, fused, plain, both, agree, text, name
):
    a = arrays(tokens=(8, 6), vocab=40)
    objective, mesh = OBJECTIVES[name](), make_mesh(text)
    expected = both(plain, a, objective)

    @jax.jit
    def on_mesh(a):
        head = {"transposed": name == "taid"}
        return both(fused, a, objective, mesh=mesh, chunk_size=3, head=head)

    agree(on_mesh(a), expected)


@pytest.mark.multidevice
@pytest.mark.parametrize("transposed", [False, True], ids=["kernel", "table"])
def test_fused_loss_exchanges_little_in_the_loop_whatever_its_chunks(
    arrays, read_program, transposed
):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    a = arrays(tokens=(256,), vocab=40)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    tokens, kernel = P(("data", "fsdp")), P("fsdp", "tensor")
    if transposed:
        kernel = P("tensor", "fsdp")
        a = {k: v.T if "kernel" in k else v for k, v in a.items()}
    where = {name: kernel if "kernel" in name else tokens for name in a}
    a = {k: jax.device_put(v, NamedSharding(mesh, where[k])) for k, v in a.items()}

    def total(a, objective, mask, chunk_size, hidden, kernel):
        heads = (Head(k, transposed=transposed) for k in (kernel, a["teacher_kernel"]))
        student_head, teacher_head = heads
        return loss.fused_loss(
            objective,
            hidden,
            student_head,
            a["teacher"],
            teacher_head,
            mask and a[mask],
            mesh=mesh,
            chunk_size=chunk_size,
        )[0]

    def compiled(chunk_size, mask):
        def of(a):
            objective = loss.TAID(jnp.float32(0.4))
            one = functools.partial(total, a, objective, mask, chunk_size)
            return jax.value_and_grad(one, (0, 1))(a["student"], a["kernel"])

        return read_program(jax.jit(of).lower(a).compile().as_text())

    for mask in ("mask", None):
        # 64 tokens on a device.
        few, many = compiled(32, mask), compiled(4, mask)
        assert few.looped
        assert max(few.looped) <= 32
        assert max(many.looped) <= 4
        assert len(few.collectives) == len(many.collectives)
        for program in (few, many):
            assert program.flops * 8 == 2 * 256 * 40 * (3 * STUDENT + TEACHER)


@pytest.mark.multidevice
@pytest.mark.parametrize("text", ["data=8", "data=2,fsdp=2,tensor=2"])
def test_fused_loss_of_many_chunks_on_eight_devices_equals_one(
    arrays, fused, plain, both, agree, small_chunks, read_program, text
):
    a, objective = arrays(tokens=(8, 350), vocab=40), loss.TAID(jnp.float32(0.4))
    mesh = make_mesh(text)

    @jax.jit
    def on_mesh(a):
        return both(fused, a, objective, mesh=mesh)

    agree(on_mesh(a), both(plain, a, objective))
    program = read_program(on_mesh.lower(a).compile().as_text())
    # One number for each token of a chunk.
    assert max(program.looped, default=0) <= 128
