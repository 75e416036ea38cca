"""The fused head on a mesh: which axes hold tokens, which the head, what travels."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Float, Shaped

from taid_jax.loss._objective import Objective
from taid_jax.loss._one_pass import runs_on
from taid_jax.loss._teachers import TeacherRows, TeachersHead
from taid_jax.types import DATA, FSDP, TENSOR, Head


class Moving(NamedTuple):
    """What may be differentiated."""

    objective: Objective
    hidden: Array
    head: Head


class Fixed(NamedTuple):
    """What may not."""

    teachers: TeacherRows
    head: TeachersHead
    mask: Array | None
    labels: Array | None


class Gradients(NamedTuple):
    """Gradients of the summed loss, float32; None where not wanted.

    Of the objective those of its leaves that are floats. As a static argument it holds
    whether each is wanted.
    """

    objective: Any
    hidden: Any
    kernel: Any
    bias: Any


class Outcome(NamedTuple):
    """Weighted sums over tokens, and gradients of the first."""

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    gradients: Gradients


class Partition(NamedTuple):
    """The axes of a mesh by what they do.

    Attributes:
        mesh: All of it.
        free: Axes that the caller is not inside of already.
        tokens: Those that the leading axis of the tokens is spread over.
        fsdp: Over how many devices the heads are spread outside the loop.
        tensor: Over how many the vocabulary is, by the compiler inside the loop: an
            objective is written for whole rows, and only its sums have to travel.
    """

    mesh: Mesh | AbstractMesh
    free: frozenset[str]
    tokens: tuple[str, ...]
    fsdp: int
    tensor: int


def find_partition(
    mesh: Mesh | None, leading: int
) -> tuple[Partition | None, str, bool]:
    """Returns how to spread the work, the platform, and whether `one_pass` fits.

    The partition is None on one device, and where the spreading is the compiler's. The
    platform is "cpu", "gpu" or "tpu".

    Args:
        mesh: The mesh of the call; that of `jax.set_mesh` when None. Axes over which
            the caller is already inside a `shard_map` are left alone.
        leading: Size of the tokens' leading axis. One that the mesh does not divide
            is not spread by hand.
    """
    context = jax.sharding.get_abstract_mesh()
    found = context if mesh is None or context.manual_axes else mesh
    platform, fits = jax.default_backend(), runs_on(jax.devices()[0])
    if found.empty:
        # Nothing says how arrays lie.
        return None, platform, fits and jax.device_count() == 1
    if isinstance(found, Mesh):
        device = found.devices.flat[0]
        platform, fits = device.platform, runs_on(device)
    elif found.abstract_device is not None:
        platform = found.abstract_device.platform
    free = [name for name in found.axis_names if name not in context.manual_axes]
    sizes = {name: found.shape[name] for name in free}
    tokens = tuple(name for name in (DATA, FSDP) if sizes.get(name, 1) > 1)
    fsdp, tensor = sizes.get(FSDP, 1), sizes.get(TENSOR, 1)
    over_tokens = math.prod(sizes[name] for name in tokens)
    uneven = leading % over_tokens
    # Every row of logits has to lie whole on one device.
    fits = fits and not uneven and over_tokens == math.prod(sizes.values())
    if uneven or (not tokens and tensor == 1):
        return None, platform, fits
    return Partition(found, frozenset(free), tokens, fsdp, tensor), platform, fits


Local = Callable[[Partition | None, Moving, Fixed], Outcome]
"""Gives the sums over the tokens of one device, whose heads are whole."""


def over_mesh(
    local: Local, partition: Partition | None, moving: Moving, fixed: Fixed
) -> Outcome:
    """Returns the sums over all tokens and their gradients, laid out as their arrays.

    Args:
        local: What each device does.
        partition: How the work lies on a mesh; None on one device.
        moving: Objective, student's hidden states `(*tokens, d)` and head.
        fixed: Teachers' hidden states and heads, mask and labels.
    """
    context = jax.sharding.get_abstract_mesh()
    mesh = partition and partition.mesh
    if isinstance(mesh, Mesh) and context.empty and mesh.explicit_axes:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return over_mesh(local, partition, moving, fixed)
    # Layouts stand where the trees of arrays have arrays: hence Any.
    whole: Any = PartitionSpec()
    if context.explicit_axes:
        # Layouts are part of types there, which an objective knows nothing of: inside,
        # they are the compiler's business.
        layouts = jax.tree.map(
            lambda x: jax.typeof(x).sharding.spec,
            (moving.hidden, moving.head.kernel, moving.head.bias),
        )
        run: Any = jax.sharding.auto_axes(
            functools.partial(over_mesh, local, partition),
            axes=context.explicit_axes,
            out_sharding=Outcome(whole, whole, Gradients(whole, *layouts)),
        )
        return run(moving, fixed)
    if partition is None:
        return local(None, moving, fixed)
    if not context.empty:
        partition = partition._replace(mesh=context)

    def gathered(head: Head, dtype: Any) -> Head:
        # Cast first: half the bytes travel where parameters are float32.
        kernel = _gather_kernel(head.kernel.astype(dtype), head.axes, partition)
        return dataclasses.replace(head, kernel=kernel)

    def on_device(moving: Moving, fixed: Fixed) -> Outcome:
        loss, metrics, gradients = local(partition, moving, fixed)
        in_leaves, in_hidden, in_kernel, in_bias = gradients
        if partition.tokens:
            loss, metrics, in_leaves, in_bias = lax.psum(
                (loss, metrics, in_leaves, in_bias), partition.tokens
            )
        if in_kernel is not None:
            in_kernel = jnp.expand_dims(in_kernel, 0)
        gradients = Gradients(in_leaves, in_hidden, in_kernel, in_bias)
        return Outcome(loss, metrics, gradients)

    axes = moving.head.axes
    moving = moving._replace(head=gathered(moving.head, moving.hidden.dtype))
    heads = fixed.head.map_dense(
        lambda x, head: gathered(head, x.dtype), fixed.teachers
    )
    fixed = fixed._replace(head=heads)
    tokens: Any = PartitionSpec(partition.tokens or None)
    loss, metrics, gradients = jax.shard_map(
        on_device,
        mesh=partition.mesh,
        in_specs=(Moving(whole, tokens, whole), Fixed(tokens, whole, tokens, tokens)),
        out_specs=Outcome(whole, whole, Gradients(whole, tokens, tokens, whole)),
        axis_names=set(partition.free) - ({TENSOR} if partition.tensor > 1 else set()),
        check_vma=False,
    )(moving, fixed)
    if gradients.kernel is not None:
        in_kernel = _reduce_kernel(gradients.kernel, axes, partition)
        gradients = gradients._replace(kernel=in_kernel)
    return Outcome(loss, metrics, gradients)


def spread_vocabulary(
    array: Shaped[Array, "..."], axis: int, partition: Partition | None
) -> Shaped[Array, "..."]:
    """Returns an array with its vocabulary over the tensor axis, if that divides it."""
    tensor = 1 if partition is None else partition.tensor
    if tensor == 1 or array.shape[axis] % tensor:
        return array
    names = [TENSOR if i == axis else None for i in range(array.ndim)]
    return lax.with_sharding_constraint(array, PartitionSpec(*names))


def _kernel_specs(
    shape: tuple[int, ...], axes: tuple[int, int], partition: Partition
) -> tuple[PartitionSpec, PartitionSpec]:
    """Returns the layouts of a kernel with axes (d_model, vocab), out and in the loop.

    An axis that the mesh does not divide stays whole.
    """
    model, vocab = axes
    names: list[str | None] = [None, None]
    if partition.tensor > 1 and shape[vocab] % partition.tensor == 0:
        names[vocab] = TENSOR
    whole = PartitionSpec(*names)
    if partition.fsdp > 1 and shape[model] % partition.fsdp == 0:
        names[model] = FSDP
    return PartitionSpec(*names), whole


def _gather_kernel(
    kernel: Shaped[Array, "..."], axes: tuple[int, int], partition: Partition
) -> Shaped[Array, "..."]:
    """Returns a kernel that is whole on every device of the fsdp axis."""
    spread, whole = _kernel_specs(kernel.shape, axes, partition)

    def local(shard: Array) -> Array:
        if spread == whole:
            return shard
        return lax.all_gather(shard, FSDP, axis=axes[0], tiled=True)

    return _per_device(local, spread, whole, partition)(kernel)


def _reduce_kernel(
    gradients: Float[Array, "shards ..."], axes: tuple[int, int], partition: Partition
) -> Float[Array, "..."]:
    """Returns the sum of a kernel's gradients, laid out as the kernel.

    Args:
        gradients: That of the tokens of every device, along the leading axis.
        axes: Which axis of the kernel is d_model, which the vocabulary.
        partition: Where they lie.
    """
    spread, whole = _kernel_specs(gradients.shape[1:], axes, partition)

    def local(gradient: Array) -> Array:
        gradient, rest = jnp.squeeze(gradient, 0), partition.tokens
        if spread != whole:
            gradient = lax.psum_scatter(
                gradient, FSDP, scatter_dimension=axes[0], tiled=True
            )
            rest = tuple(name for name in rest if name != FSDP)
        return lax.psum(gradient, rest) if rest else gradient

    stacked = PartitionSpec(partition.tokens or None, *whole)
    return _per_device(local, stacked, spread, partition)(gradients)


def _per_device(
    function: Callable[[Array], Array],
    in_spec: PartitionSpec,
    out_spec: PartitionSpec,
    partition: Partition,
) -> Callable[[Array], Array]:
    """Returns a function written per device of the whole mesh.

    Collectives over some axes of a mesh inside a loop that leaves others to the
    compiler make it gather the others first.
    """
    return jax.shard_map(
        function,
        mesh=partition.mesh,
        in_specs=in_spec,
        out_specs=out_spec,
        axis_names=set(partition.free),
        check_vma=False,
    )
