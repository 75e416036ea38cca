"""From named tensors of a checkpoint to the parameter tree."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding
from jax.typing import DTypeLike

from taid_jax.models.config import DecoderConfig
from taid_jax.models.entries import (
    Entry,
    FileFormat,
    axis_sizes,
    entries,
    head_names,
)
from taid_jax.models.errors import ModelError
from taid_jax.models.families import family_named, is_ignored
from taid_jax.models.layout import Index, Sizes

Shardings = Sharding | Mapping[str, Any] | Callable[[DecoderConfig], Any]
"""One sharding for all parameters, a tree of them, or what makes the tree."""

_MOST_LINES = 1000


@runtime_checkable
class Tensors(Protocol):
    """The tensors of a checkpoint, read one at a time or in parts."""

    @property
    def origin(self) -> str:
        """Where they come from, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each, slowest axis first."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a part of one, in a float dtype."""
        ...


def check_tensors(config: DecoderConfig, file_format: FileFormat, tensors: Tensors):
    """Raises unless the tensors are those of the model, each of its shape.

    Raises:
        ModelError: With every tensor that is missing, unexpected or misshapen.
    """
    family, sizes = family_named(config.family), axis_sizes(config)
    expected = {
        name: entry.tensor_shape(sizes)
        for entry in entries(config, file_format)
        for names in entry.names
        for name in names
    }
    shapes = tensors.shapes
    lines = [
        f"missing: {name}, shape {shape}"
        for name, shape in expected.items()
        if name not in shapes
    ]
    lines += [
        f"wrong shape: {name} has {shapes[name]}, the config needs {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    tied = head_names(family, file_format) if config.tie_embeddings else frozenset()
    lines += [
        f"unexpected: {name}, shape {shape}"
        for name, shape in shapes.items()
        if name not in expected and name not in tied and not is_ignored(family, name)
    ]
    if lines:
        count, shown = len(lines), lines[:_MOST_LINES]
        shown += [f"... and {count - _MOST_LINES} more"] * (count > _MOST_LINES)
        raise ModelError(
            f"the weights in {tensors.origin} are not those of its config "
            f"({count} differences):\n  " + "\n  ".join(shown)
        )


def shardings_for(config: DecoderConfig, shardings: Shardings | None) -> Any:
    """Returns one sharding, or a tree of them, or None for the default device."""
    return shardings(config) if callable(shardings) else shardings


def load_params(
    config: DecoderConfig,
    file_format: FileFormat,
    tensors: Tensors,
    *,
    dtype: DTypeLike,
    shardings: Shardings | None = None,
) -> dict[str, Any]:
    """Returns the parameter tree, each array placed as it is read.

    A stacked parameter is filled layer by layer into the buffer that becomes the array,
    the largest parameters first, so that at no time more than the model and one more
    parameter are in memory. With shardings, each part is read on its own, and only the
    parts that this process's devices hold.

    Args:
        config: The architecture.
        file_format: Whose names and layouts the tensors have.
        tensors: The checkpoint; checked before anything is read.
        dtype: Of the parameters.
        shardings: Where they go; the default device when None.

    Raises:
        ModelError: If the tensors are not those of the model, or cannot be read.
    """
    check_tensors(config, file_format, tensors)
    sizes, kind = axis_sizes(config), jnp.dtype(dtype)
    where = shardings_for(config, shardings)
    params: dict[str, Any] = {}
    todo = list(entries(config, file_format))
    for entry in sorted(todo, key=lambda entry: -math.prod(entry.shape)):
        sharding = _sharding_of(where, entry.path)

        def read(index: Index, entry: Entry = entry) -> np.ndarray:
            return _read_part(entry, index, tensors, sizes, kind)

        *parents, leaf = entry.path
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = _place(read, entry.shape, sharding)
    return params


def _read_part(
    entry: Entry, index: Index, tensors: Tensors, sizes: Sizes, dtype: np.dtype
) -> np.ndarray:
    layers, rest = (index[0], index[1:]) if entry.stacked else (slice(0, 1), index)
    chosen = range(layers.start, layers.stop)
    buffer = np.empty((len(chosen), *(cut.stop - cut.start for cut in rest)), dtype)
    for row, layer in zip(buffer, chosen, strict=True):
        row[...] = entry.read(tensors.read, layer, rest, sizes)
    return buffer if entry.stacked else buffer[0]


def _place(
    read: Callable[[Index], np.ndarray],
    shape: tuple[int, ...],
    sharding: Sharding | None,
) -> Array:
    if sharding is None:
        # Not committed to its device, so that it goes along with whatever uses it.
        whole = tuple(slice(0, size) for size in shape)
        return jax.block_until_ready(jax.device_put(read(whole)))
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        cuts = [
            cut.indices(size)[:2] for cut, size in zip(index or (), shape, strict=True)
        ]
        holders.setdefault(tuple(cuts), []).append(device)
    pieces = []
    for cuts, devices in holders.items():
        part = read(tuple(slice(*cut) for cut in cuts))
        pieces += [jax.device_put(part, device) for device in devices]
        # The buffer is given up only when the device has its copy.
        jax.block_until_ready(pieces)
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _sharding_of(where: Any, path: tuple[str, ...]) -> Sharding | None:
    if where is None or isinstance(where, Sharding):
        return where
    for key in path:
        where = where[key]
    return where
