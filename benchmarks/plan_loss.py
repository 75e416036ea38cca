"""Compiles the fused head and the plain form for a TPU or GPU that is not there.

Prints what XLA's compiler says of TAID's mean loss and its gradients in the student's
hidden states and head, in bfloat16: temporary memory of a device, what its kernels read
and write, and the operations of the matrix products as a share of those that are
needed. On several devices the tokens lie over data and fsdp, the vocabulary over
tensor. Needs the `tpu` or `cuda` extra, no TPU or GPU.
"""

import argparse
import collections
import sys
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from taid_jax import loss
from taid_jax.errors import InputError, refuse
from taid_jax.plan import find_machine
from taid_jax.plan.compiled import compiled_anew, plan_mesh
from taid_jax.plan.flops import count_flops
from taid_jax.plan.traffic import Kernel, list_kernels
from taid_jax.sharding import MESH_AXES


def compile_loss(
    mesh: Mesh, args: argparse.Namespace, *, fused: bool
) -> tuple[int, list[Kernel], float]:
    """Returns bytes of temporaries, kernels, products as a share of the four."""
    n, student, teacher, vocab = (
        args.tokens,
        args.student_dim,
        args.teacher_dim,
        args.vocab,
    )

    def mean(hidden, kernel, teacher_hidden, teacher_kernel, mask):
        heads = loss.Head(kernel), loss.Head(teacher_kernel)
        objective = loss.TAID(jnp.float32(0.4))
        if fused:
            total, sums = loss.fused_loss(
                objective, hidden, heads[0], teacher_hidden, heads[1], mask, mesh=mesh
            )
        else:
            logits = heads[0].logits(hidden), heads[1].logits(teacher_hidden)
            total, sums = loss.distillation_sums(objective, *logits, mask)
        return total / sums["num_tokens"]

    def shape(where: PartitionSpec, *sizes: int) -> jax.ShapeDtypeStruct:
        layout = NamedSharding(mesh, where)
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=layout)

    tokens, head = PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp", "tensor")
    traced = jax.jit(jax.value_and_grad(mean, argnums=(0, 1))).trace(
        shape(tokens, n, student),
        shape(head, student, vocab),
        shape(tokens, n, teacher),
        shape(head, teacher, vocab),
        shape(tokens, n),
    )
    with compiled_anew():
        compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError(f"the compiler for {mesh.devices.flat[0]} gives no memory")
    needed = 2 * n * vocab * (3 * student + teacher)
    kernels = list_kernels(compiled.as_text() or "")
    return memory.temp_size_in_bytes, kernels, count_flops(traced.jaxpr) / needed


def gigabytes(kernels: Iterable[Kernel]) -> str:
    """Returns what kernels move in all, in words."""
    return f"{sum(kernel.total_bytes for kernel in kernels) / 1e9:.1f} GB"


def print_kernels(kernels: Iterable[Kernel]) -> None:
    """Prints what moves a megabyte or more in a run, then a sum for each loop."""
    outside: collections.Counter[int] = collections.Counter()
    for kernel in kernels:
        outside[kernel.runs] += 0 if kernel.product else kernel.bytes
        if kernel.bytes >= 1e6:
            what = "product" if kernel.product else "other"
            moved = f"{kernel.runs:4} x {kernel.bytes / 1e9:.3f} GB"
            print(f"  {moved}, {what}: {kernel.name}")
    for runs, moved in outside.items():
        print(f"  {runs:4} x {moved / 1e9:.3f} GB outside products")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("machine", nargs="+", help="such as v5p:2x2x2 or h100:8")
    parser.add_argument(
        "--mesh", help="data=2,fsdp=2,tensor=2; one device when left out"
    )
    parser.add_argument(
        "--kernels", action="store_true", help="list what reads and writes memory"
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--student-dim", type=int, default=2048)
    parser.add_argument("--teacher-dim", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Compiles and prints; 2 for a machine or mesh that cannot be had."""
    args = parse(arguments)
    for name in args.machine:
        try:
            machine = find_machine(name)
            if args.mesh:
                mesh = plan_mesh(args.mesh, machine)
            else:
                mesh = Mesh([[[machine.devices[0]]]], MESH_AXES)
        except InputError as error:
            return refuse(error)
        for form in ("fused", "plain"):
            temp, kernels, share = compile_loss(mesh, args, fused=form == "fused")
            outside = [kernel for kernel in kernels if not kernel.product]
            print(
                f"{name} {args.mesh or 'one device'}, {form}: {temp / 2**30:.2f} GiB, "
                f"{gigabytes(kernels)} moved, {gigabytes(outside)} outside products, "
                f"{share:.4f} of the products needed",
                flush=True,
            )
            if args.kernels:
                print_kernels(kernels)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
