"""The fused head on every device of a mesh, or on the one there is."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from taid_jax.loss._fused import mesh as fused_mesh
from taid_jax.loss._fused.chunks import (
    Gradients,
    Outcome,
    Tokens,
    run_chunks,
)
from taid_jax.loss._fused.mesh import Partition
from taid_jax.loss._fused.plan import make_plan
from taid_jax.loss._fused.rows import Problem, Wanted
from taid_jax.loss._objective import Objective
from taid_jax.loss._reduce import select_tokens, token_weights
from taid_jax.types import Head


class Static(NamedTuple):
    """What is known before tracing.

    Attributes:
        vocab_size: Entries that count.
        chunk_size: Tokens of a chunk; chosen when None.
        partition: How the work lies on a mesh; None on one device.
        platform: "cpu", "gpu" or "tpu".
        dtypes: Those of the student's hidden states, kernel and bias.
    """

    vocab_size: int
    chunk_size: int | None
    partition: Partition | None
    platform: str
    dtypes: tuple[jnp.dtype, jnp.dtype, jnp.dtype]


class Moving(NamedTuple):
    """What may be differentiated."""

    objective: Objective
    hidden: Array
    head: Head


class Fixed(NamedTuple):
    """What may not."""

    hidden: Array | None
    head: Head | None
    mask: Array | None
    labels: Array | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(static: Static, wanted: Wanted, moving: Moving, fixed: Fixed) -> Outcome:
    """Returns what `run_shards` does.

    Under `vmap` with a mask for every example the examples take turns: which tokens are
    skipped is a branch, and a branch of many examples would be all branches of each.
    """
    one = functools.partial(run_shards, static, wanted)
    batched = jax.custom_batching.custom_vmap(one)

    @batched.def_vmap
    def rule(
        size: int, mapped: Sequence[Any], moving: Moving, fixed: Fixed
    ) -> tuple[Outcome, Any]:
        leaves, tree = jax.tree.flatten((moving, fixed))
        flags = jax.tree.leaves(mapped)

        def example(index: Array) -> Outcome:
            pairs = zip(leaves, flags, strict=True)
            return batched(*tree.unflatten([x[index] if f else x for x, f in pairs]))

        def together(*leaves: Array) -> Outcome:
            return one(*tree.unflatten(leaves))

        if mapped[1].mask:
            outcome = lax.map(example, jnp.arange(size))
        else:
            in_axes = tuple(0 if flag else None for flag in flags)
            outcome = jax.vmap(together, in_axes=in_axes)(*leaves)
        return outcome, jax.tree.map(lambda _: True, outcome)

    return batched(moving, fixed)


def run_shards(static: Static, wanted: Wanted, moving: Moving, fixed: Fixed) -> Outcome:
    """Returns the sums over all tokens and their gradients, laid out as their arrays.

    Args:
        static: What is known before tracing.
        wanted: Which gradients are formed.
        moving: Objective, student's hidden states `(*tokens, d)` and head.
        fixed: Teacher's hidden states and head, mask and labels.
    """
    context = jax.sharding.get_abstract_mesh()
    mesh = static.partition and static.partition.mesh
    if isinstance(mesh, Mesh) and context.empty and mesh.explicit_axes:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run_shards(static, wanted, moving, fixed)
    if context.explicit_axes:
        # Layouts are part of types there, which an objective knows nothing of: inside,
        # they are the compiler's business.
        whole: Any = PartitionSpec()
        of_hidden, of_kernel, of_bias = map(
            _spec, (moving.hidden, moving.head.kernel, moving.head.bias)
        )
        layouts = Gradients(whole, of_hidden, of_kernel, of_bias)
        run: Any = jax.sharding.auto_axes(
            functools.partial(run_shards, static, wanted),
            axes=context.explicit_axes,
            out_sharding=Outcome(whole, whole, layouts),
        )
        return run(moving, fixed)
    partition = static.partition
    if partition is None:
        return _run_local(static, wanted, moving, fixed)
    if not context.empty:
        partition = partition._replace(mesh=context)
        static = static._replace(partition=partition)
    axes = moving.head.axes

    def gathered(head: Head, dtype: Any) -> Head:
        # Cast first: half the bytes travel where parameters are float32.
        kernel = head.kernel.astype(dtype)
        kernel = fused_mesh.gather_kernel(kernel, head.axes, partition)
        return dataclasses.replace(head, kernel=kernel)

    moving = moving._replace(head=gathered(moving.head, moving.hidden.dtype))
    if fixed.head is not None and fixed.hidden is not None:
        fixed = fixed._replace(head=gathered(fixed.head, fixed.hidden.dtype))

    def local(moving: Moving, fixed: Fixed) -> Outcome:
        loss, metrics, gradients = _run_local(static, wanted, moving, fixed)
        in_leaves, in_hidden, in_kernel, in_bias = gradients
        if partition.tokens:
            loss, metrics, in_leaves, in_bias = lax.psum(
                (loss, metrics, in_leaves, in_bias), partition.tokens
            )
        if in_kernel is not None:
            in_kernel = jnp.expand_dims(in_kernel, 0)
        gradients = Gradients(in_leaves, in_hidden, in_kernel, in_bias)
        return Outcome(loss, metrics, gradients)

    # Layouts stand where the trees of arrays have arrays: hence Any.
    whole: Any = PartitionSpec()
    tokens: Any = fused_mesh.tokens_spec(partition)
    loss, metrics, gradients = jax.shard_map(
        local,
        mesh=partition.mesh,
        in_specs=(Moving(whole, tokens, whole), Fixed(tokens, whole, tokens, tokens)),
        out_specs=Outcome(whole, whole, Gradients(whole, tokens, tokens, whole)),
        axis_names=set(partition.manual),
        check_vma=False,
    )(moving, fixed)
    in_leaves, in_hidden, in_kernel, in_bias = gradients
    if in_kernel is not None:
        in_kernel = fused_mesh.reduce_kernel(in_kernel, axes, partition)
    return Outcome(loss, metrics, Gradients(in_leaves, in_hidden, in_kernel, in_bias))


def _spec(array: Array | None) -> Any:
    return None if array is None else jax.typeof(array).sharding.spec


def _width(head: Head) -> int:
    return head.kernel.shape[head.axes[1]]


def _run_local(static: Static, wanted: Wanted, moving: Moving, fixed: Fixed) -> Outcome:
    """Returns the sums over the tokens of one device; the heads are whole."""
    hidden, partition = moving.hidden, static.partition
    vocab, entries = moving.head.axes[1], _width(moving.head)
    width = entries if fixed.head is None else min(entries, _width(fixed.head))

    def spread(array: Array, axis: int) -> Array:
        return fused_mesh.spread_vocabulary(array, axis, partition)

    def cut(head: Head, dtype: Any) -> Head:
        axis = head.axes[1]
        kernel = lax.slice_in_dim(head.kernel, 0, width, axis=axis).astype(dtype)
        bias = None if head.bias is None else head.bias[:width]
        return dataclasses.replace(head, kernel=spread(kernel, axis), bias=bias)

    student, teacher, teacher_hidden = cut(moving.head, hidden.dtype), None, None
    if fixed.head is not None and fixed.hidden is not None:
        teacher = cut(fixed.head, fixed.hidden.dtype)
        teacher_hidden = fixed.hidden.reshape(-1, fixed.hidden.shape[-1])
    weight = token_weights(fixed.mask, hidden.shape[:-1], fixed.labels)
    if fixed.mask is None and fixed.labels is not None:
        # A mask sorts these out; labels alone seldom leave many out.
        hidden = select_tokens(hidden, weight)
        if teacher_hidden is not None:
            teacher_hidden = select_tokens(teacher_hidden, weight.reshape(-1))
    tokens = Tokens(
        hidden.reshape(-1, hidden.shape[-1]),
        teacher_hidden,
        weight.reshape(-1),
        None if fixed.labels is None else fixed.labels.reshape(-1),
    )
    problem = Problem(moving.objective, student, teacher, static.vocab_size)
    tensor = 1 if partition is None else partition.tensor
    on_device = -(-width // tensor)
    parts = 1 if width % tensor else tensor
    plan = make_plan(weight.size, on_device, static.platform, static.chunk_size)
    masked = fixed.mask is not None
    loss, metrics, (in_leaves, in_hidden, in_kernel, in_bias) = run_chunks(
        problem, tokens, masked, plan, wanted, spread, parts
    )
    if in_hidden is not None:
        in_hidden = in_hidden.reshape(hidden.shape)
    rest = (0, entries - width)
    if in_kernel is not None and entries > width:
        in_kernel = jnp.pad(in_kernel, [rest if i == vocab else (0, 0) for i in (0, 1)])
    if in_bias is not None and entries > width:
        in_bias = jnp.pad(in_bias, rest)
    metrics = {"num_tokens": jnp.sum(weight), **metrics}
    return Outcome(loss, metrics, Gradients(in_leaves, in_hidden, in_kernel, in_bias))
