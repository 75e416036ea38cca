"""Mesh, the table of logical axes, and placing arrays by it."""

import contextlib
import contextvars
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from taid_jax.errors import InputError, show
from taid_jax.types import DATA, FSDP, TENSOR

MESH_AXES = (DATA, FSDP, TENSOR)

# Logical name of an array's axis -> mesh axes that it is cut over.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    # Of rows that were just read from a table whose other axis is cut over `fsdp`.
    "batch_of_parts": (DATA,),
    "length": (),
    "embed": (FSDP,),
    "heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "head_dim": (),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
    "layers": (),
    "positions": (),
    "norm": (),
}

TEACHER_RULES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "same": RULES,
    # No gathering of weights at all, where every device has room for all of them.
    "replicated": {**dict.fromkeys(RULES, ()), "batch": RULES["batch"]},
    # Where the student is repeated along `data`, the teacher need not be.
    "all_devices": {**RULES, "embed": (DATA, FSDP)},
}
"""By the name of a layout: how a teacher's parameters are cut. Nothing but their place
depends on it; activations are cut as the student's."""


class ShardingError(InputError):
    """A mesh or a logical axis that cannot be."""


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the sizes named in a text such as `data=1,fsdp=-1,tensor=1`.

    Raises:
        ShardingError: On an axis that is unknown or comes twice, a size that is no
            number from 1 on or -1, or two -1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in MESH_AXES:
            raise ShardingError(
                f"mesh: no axis is called {show(axis)}; there are {MESH_AXES}"
            )
        if axis in sizes:
            raise ShardingError(f"mesh: {axis} is given twice in {show(text)}")
        if not re.fullmatch("-1|[0-9]{1,9}", size):
            raise ShardingError(
                f"mesh: need axis=size with an integer, got {show(part)}"
            )
        sizes[axis] = int(size)
    if 0 in sizes.values():
        raise ShardingError(
            f"mesh: need sizes >= 1, or -1 for the rest, got {show(text)}"
        )
    if list(sizes.values()).count(-1) > 1:
        raise ShardingError(
            f"mesh: only one axis can take the rest (-1), got {show(text)}"
        )
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of `text` over all devices.

    Args:
        text: Sizes as in `parse_mesh`; -1 takes the devices that are left.
        devices: All of JAX's devices when None.

    Raises:
        ShardingError: If the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(text)
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and len(devices) % known == 0:
        rest = len(devices) // known
        sizes = {axis: rest if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ShardingError(
            f"mesh: {text} does not match the {len(devices)} device(s) there are; "
            "the sizes have to multiply to that number"
        )
    shape = tuple(sizes.values())
    grid = np.asarray(devices).reshape(shape)
    if grid.size == len(jax.devices()) and len(devices) > 1:
        # Lets JAX choose an order in which neighbours are near each other.
        return jax.make_mesh(
            shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
        )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    name: str = "array",
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> PartitionSpec:
    """Returns how an array with these logical axes is cut over the mesh.

    An axis that the mesh does not divide stays whole, with a warning that names it.

    Raises:
        ShardingError: If a logical axis is not in the table, or their number is not
            the number of dimensions.
    """
    if len(axes) != len(shape):
        raise ShardingError(f"{name}: {len(shape)} dimensions, but axes {tuple(axes)}")
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise ShardingError(
                f"{name}: no logical axis is called {axis!r}; there are {tuple(rules)}"
            )
        over = () if axis is None else rules[axis]
        over = tuple(part for part in over if mesh.shape[part] > 1)
        parts = math.prod(mesh.shape[part] for part in over)
        if size % parts:
            warnings.warn(
                f"{name}: axis {axis} of size {size} is not cut over {over}, which "
                f"has {parts} parts; it stays whole on each device",
                stacklevel=2,
            )
            over = ()
        entries.append(over if len(over) > 1 else over[0] if over else None)
    return PartitionSpec(*entries)


def tree_shardings(
    axes: Any,
    shapes: Any,
    mesh: Mesh,
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> Any:
    """Returns the sharding of every array of a tree.

    Args:
        axes: A tree whose leaves are tuples of logical axis names.
        shapes: The same tree with arrays or `jax.ShapeDtypeStruct`.
        mesh: Where they go.
        rules: Logical name of an axis to the mesh axes that it is cut over.
    """

    def one(path, leaf, names):
        text = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, text, rules))

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of `(batch, length)` arrays."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], None))


_ACTIVATIONS: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar(
    "activations", default=None
)


@contextlib.contextmanager
def activations_on(mesh: Mesh | None) -> Iterator[None]:
    """Within it, `constrain` says how activations are cut over this mesh."""
    token = _ACTIVATIONS.set(mesh)
    try:
        yield
    finally:
        _ACTIVATIONS.reset(token)


def activation_mesh() -> Mesh | None:
    """Returns the mesh of `activations_on`; None outside of it."""
    return _ACTIVATIONS.get()


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Returns an activation, cut over the mesh of `activations_on` by its axes' names.

    Without it XLA chooses, and may give every device all tokens. The array itself where
    there is no such mesh, where its axes are explicit, or where they do not divide it.

    Args:
        x: The activation.
        axes: A logical name for each of its axes; None for what stays whole.
    """
    mesh = _ACTIVATIONS.get()
    if mesh is None or mesh.size == 1 or set(mesh.axis_types) != {AxisType.Auto}:
        return x
    parts = [() if axis is None else RULES[axis] for axis in axes]
    for size, over in zip(x.shape, parts, strict=True):
        if size % math.prod(mesh.shape[part] for part in over):
            return x
    spec = PartitionSpec(*(over or None for over in parts))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def batch_rows(mesh: Mesh) -> int:
    """Returns the rows of the smallest batch that all devices share."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises if the sequences of a (micro-)batch cannot be shared out evenly.

    Raises:
        ShardingError: With both numbers.
    """
    parts = batch_rows(mesh)
    if batch_size % parts:
        raise ShardingError(
            f"a (micro-)batch of {batch_size} sequences cannot be shared out over "
            f"{parts} devices (mesh axes {RULES['batch']}); choose a multiple"
        )


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Returns which part of every batch this process gives, and how many there are.

    Processes that hold the same rows, where the tensor axis spans them, give the same
    part. Parts are numbered by their first row: in order, they are the batch.

    Raises:
        ShardingError: If the mesh has processes that share only some of their rows.
    """
    parts = batch_rows(mesh)
    where = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    rows: dict[int, set[int]] = {}
    for device, (cut,) in where.devices_indices_map((parts,)).items():
        rows.setdefault(device.process_index, set()).update(range(parts)[cut])
    distinct = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(len(held) for held in distinct) != parts or len(set(map(len, distinct))) > 1:
        shown = {process: sorted(held) for process, held in sorted(rows.items())}
        raise ShardingError(
            f"mesh: the processes share the {parts} parts of a batch unevenly ({shown} "
            "by process); choose data and fsdp so that each process has whole parts"
        )
    mine = tuple(sorted(rows[jax.process_index()]))
    return distinct.index(mine), len(distinct)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns a batch on its devices; each process gives its part (`batch_part`)."""
    sharding = batch_sharding(mesh)
    _, parts = batch_part(mesh)
    return {
        key: jax.make_array_from_process_local_data(
            sharding, value, (len(value) * parts, *value.shape[1:])
        )
        for key, value in batch.items()
    }
