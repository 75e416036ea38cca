"""How the fused head lies on a mesh: which axes hold tokens, and which the head."""

import math
from typing import NamedTuple

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Shaped

from taid_jax.types import DATA, FSDP, TENSOR


class Partition(NamedTuple):
    """The axes of a mesh by what they do.

    Attributes:
        mesh: All of it.
        manual: Axes over which the program is written per device.
        tokens: Those of them that the leading axis of the tokens is spread over.
        fsdp: Whether the heads are spread over that axis outside the loop.
        tensor: Over how many devices the compiler spreads the vocabulary.
    """

    mesh: Mesh | AbstractMesh
    manual: frozenset[str]
    tokens: tuple[str, ...]
    fsdp: bool
    tensor: int


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
    known = (DATA, FSDP) if tensor > 1 else (DATA, FSDP, TENSOR)
    manual = frozenset(n for n in free if n in known or sizes[n] == 1)
    fsdp = sizes.get(FSDP, 1) > 1
    return Partition(found, manual, tokens, fsdp, tensor), platform


def _platform(mesh: Mesh | AbstractMesh) -> str:
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    if mesh.abstract_device is not None:
        return mesh.abstract_device.platform
    return jax.default_backend()


def tokens_spec(partition: Partition) -> PartitionSpec:
    """Returns the layout of an array whose leading axis holds tokens."""
    return PartitionSpec(partition.tokens or None)


def kernel_spec(
    kernel: Shaped[Array, "..."], model_axis: int, partition: Partition
) -> PartitionSpec:
    """Returns the layout of a kernel outside the loop, over the manual axes."""
    if not partition.fsdp or kernel.shape[model_axis] % partition.mesh.shape[FSDP]:
        return PartitionSpec()
    return PartitionSpec(*(FSDP if axis == model_axis else None for axis in (0, 1)))


def gather_kernel(
    kernel: Shaped[Array, "..."], spec: PartitionSpec
) -> Shaped[Array, "..."]:
    """Returns the whole kernel on every device of the fsdp axis."""
    if FSDP not in spec:
        return kernel
    return lax.all_gather(kernel, FSDP, axis=spec.index(FSDP), tiled=True)


def reduce_kernel(
    gradient: Shaped[Array, "..."], spec: PartitionSpec, partition: Partition
) -> Shaped[Array, "..."]:
    """Returns the sum of a kernel's gradient over devices, laid out as the kernel."""
    rest = partition.tokens
    if FSDP in spec:
        axis = spec.index(FSDP)
        gradient = lax.psum_scatter(gradient, FSDP, scatter_dimension=axis, tiled=True)
        rest = tuple(name for name in rest if name != FSDP)
    return lax.psum(gradient, rest) if rest else gradient


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


def is_explicit(partition: Partition) -> bool:
    """Returns whether the tensor axis is one whose shardings are part of types."""
    types = dict(zip(partition.mesh.axis_names, partition.mesh.axis_types, strict=True))
    return partition.tensor > 1 and types[TENSOR] == AxisType.Explicit
