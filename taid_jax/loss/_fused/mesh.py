"""How the fused head lies on a mesh: which axes hold tokens, and which the head."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Float, Shaped

from taid_jax.types import DATA, FSDP, TENSOR


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

    @property
    def manual(self) -> frozenset[str]:
        """Axes over which the loop is written per device."""
        return self.free - ({TENSOR} if self.tensor > 1 else set())


def find_partition(mesh: Mesh | None, leading: int) -> tuple[Partition | None, str]:
    """Returns how to spread the work, and the platform: "cpu", "gpu" or "tpu".

    The partition is None on one device, and where the spreading is the compiler's.

    Args:
        mesh: The mesh of the call; that of `jax.set_mesh` when None. Axes over which
            the caller is already inside a `shard_map` are left alone.
        leading: Size of the tokens' leading axis. One that the mesh does not divide
            is not spread by hand.
    """
    context = jax.sharding.get_abstract_mesh()
    found = context if mesh is None or context.manual_axes else mesh
    if found.empty:
        return None, jax.default_backend()
    platform = _platform(found)
    free = [name for name in found.axis_names if name not in context.manual_axes]
    sizes = {name: found.shape[name] for name in free}
    tokens = tuple(name for name in (DATA, FSDP) if sizes.get(name, 1) > 1)
    tensor = sizes.get(TENSOR, 1)
    if not tokens and tensor == 1:
        return None, platform
    if leading % math.prod(sizes[name] for name in tokens):
        return None, platform
    partition = Partition(
        found, frozenset(free), tokens, sizes.get(FSDP, 1), sizes.get(TENSOR, 1)
    )
    return partition, platform


def _platform(mesh: Mesh | AbstractMesh) -> str:
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    if mesh.abstract_device is not None:
        return mesh.abstract_device.platform
    return jax.default_backend()


def tokens_spec(partition: Partition) -> PartitionSpec:
    """Returns the layout of an array whose leading axis holds tokens."""
    return PartitionSpec(partition.tokens or None)


def _kernel_spec(
    shape: tuple[int, ...], axes: tuple[int, int], partition: Partition, whole: bool
) -> PartitionSpec:
    """Returns the layout of a kernel with axes (d_model, vocab), in or out of the loop.

    An axis that the mesh does not divide stays whole.
    """
    model, vocab = axes
    names: list[str | None] = [None, None]
    if not whole and partition.fsdp > 1 and shape[model] % partition.fsdp == 0:
        names[model] = FSDP
    if partition.tensor > 1 and shape[vocab] % partition.tensor == 0:
        names[vocab] = TENSOR
    return PartitionSpec(*names)


def gather_kernel(
    kernel: Shaped[Array, "..."], axes: tuple[int, int], partition: Partition
) -> Shaped[Array, "..."]:
    """Returns a kernel that is whole on every device of the fsdp axis.

    Args:
        kernel: Of either orientation.
        axes: Which axis is d_model, which the vocabulary.
        partition: Where it lies.
    """
    spread = _kernel_spec(kernel.shape, axes, partition, whole=False)
    whole = _kernel_spec(kernel.shape, axes, partition, whole=True)

    def local(shard: Array) -> Array:
        if spread == whole:
            return shard
        return lax.all_gather(shard, FSDP, axis=axes[0], tiled=True)

    return _per_device(local, spread, whole, partition)(kernel)


def reduce_kernel(
    gradients: Float[Array, "shards ..."], axes: tuple[int, int], partition: Partition
) -> Float[Array, "..."]:
    """Returns the sum of a kernel's gradients, laid out as the kernel.

    Args:
        gradients: That of the tokens of every device, along the leading axis.
        axes: Which axis of the kernel is d_model, which the vocabulary.
        partition: Where they lie.
    """
    shape = gradients.shape[1:]
    spread = _kernel_spec(shape, axes, partition, whole=False)
    whole = _kernel_spec(shape, axes, partition, whole=True)

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


def spread_vocabulary(
    array: Shaped[Array, "..."], axis: int, partition: Partition | None
) -> Shaped[Array, "..."]:
    """Returns an array with its vocabulary over the tensor axis, if that divides it."""
    if partition is None or partition.tensor == 1:
        return array
    if array.shape[axis] % partition.tensor:
        return array
    names = [TENSOR if i == axis else None for i in range(array.ndim)]
    return lax.with_sharding_constraint(array, PartitionSpec(*names))
