"""The fused head on eight devices against the plain form on one."""

import functools

import jax
import jax.numpy as jnp
import pytest

from taid_jax import loss
from taid_jax.plan import count_collectives, count_flops
from taid_jax.sharding import make_mesh
from taid_jax.types import Head

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
        ("data=2,fsdp=2,tensor=2", "taid"),
        ("data=2,fsdp=2,tensor=2", "dkd"),
        ("data=2,fsdp=2,tensor=2", "adaptive_kl"),
        ("data=8", "taid"),
        ("fsdp=8", "taid"),
        ("data=2,tensor=4", "taid"),
    ],
)
def test_fused_loss_eight_devices_equal_one(
    arrays, fused, plain, both, agree, text, name
):
    a = arrays(tokens=(8, 6), vocab=40)
    objective, mesh = OBJECTIVES[name](), make_mesh(text)
    expected = both(plain, a, objective)
    head = {"transposed": name == "taid"}
    agree(both(fused, a, objective, mesh=mesh, chunk_size=3, head=head), expected)


@pytest.mark.multidevice
def test_fused_loss_of_many_chunks_on_eight_devices_equals_one(
    arrays, fused, plain, both, agree, small_chunks
):
    a, objective = arrays(tokens=(8, 350), vocab=40), loss.TAID(jnp.float32(0.4))
    mesh = make_mesh("data=2,fsdp=2,tensor=2")

    on_mesh = jax.jit(lambda a: both(fused, a, objective, mesh=mesh))
    on_mesh = on_mesh.lower(a).compile()
    agree(on_mesh(a), both(plain, a, objective))
    # Of the head's gradient once, and a few numbers for each token: never its logits.
    assert count_collectives(on_mesh.as_text()).total_bytes < 8 * 350 * 40


@pytest.mark.multidevice
@pytest.mark.optimised
@pytest.mark.parametrize(
    ("transposed", "mask"),
    [
        pytest.param(False, "mask", id="kernel"),
        pytest.param(True, None, id="table"),
    ],
)
def test_fused_loss_exchanges_little_in_the_loop_whatever_its_chunks(
    arrays, transposed, mask
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

    def total(a, objective, chunk_size, hidden, kernel):
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

    def compiled(chunk_size):
        def of(a):
            objective = loss.TAID(jnp.float32(0.4))
            one = functools.partial(total, a, objective, chunk_size)
            return jax.value_and_grad(one, (0, 1))(a["student"], a["kernel"])

        flops = count_flops(jax.make_jaxpr(of)(a))
        assert flops == 2 * 256 * 40 * (3 * STUDENT + TEACHER)
        return count_collectives(jax.jit(of).lower(a).compile().as_text())

    # 64 tokens on a device: 2 chunks and 16.
    few, many = compiled(32), compiled(4)
    assert few.endless == many.endless == 0
    assert few.total_bytes == many.total_bytes
