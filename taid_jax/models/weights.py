"""From named tensors of a checkpoint to the parameter tree, and back."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding
from jax.typing import DTypeLike

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params
from taid_jax.models.errors import ModelError
from taid_jax.models.families import Family, family_named, is_ignored
from taid_jax.models.layout import Index, Layout, Sizes, parse_layout

FileFormat = Literal["hf", "gguf"]

Shardings = Sharding | Mapping[str, Any] | Callable[[DecoderConfig], Any]
"""One sharding for all parameters, a tree of them, or what makes the tree."""

_LAYERS = "layers"
_MOST_LINES = 1000


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


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and where a checkpoint holds it.

    Attributes:
        path: Keys in the parameter tree.
        names: Names of its tensors: one for each layer if it is stacked.
        layout: How a tensor becomes the parameter (of one layer).
        shape: Of the whole parameter.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    layout: Layout
    shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether the first axis of the parameter counts layers."""
        return self.path[0] == _LAYERS


def axis_sizes(config: DecoderConfig) -> Sizes:
    """Returns the size of each axis letter that layouts use."""
    return {
        "v": config.vocab_size,
        "d": config.d_model,
        "n": config.num_heads,
        "k": config.num_kv_heads,
        "h": config.head_dim,
        "f": config.mlp_dim,
        "c": 2,
        "r": config.head_dim // 2,
    }


def entries(config: DecoderConfig, file_format: FileFormat) -> tuple[Entry, ...]:
    """Returns every parameter of a model with the tensors that hold it.

    In the order in which the family declares them.

    Raises:
        ModelError: If the family declares no tensor for a parameter.
    """
    family = family_named(config.family)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    found: dict[str, list[Entry]] = {weight.module: [] for weight in family.weights}
    for keys, leaf in leaves:
        path = tuple(str(key.key) for key in keys)
        module = ".".join(path[:-1])
        if module not in found:
            raise ModelError(
                f"the family {family.name} declares no tensors for the parameters of "
                f"{module}"
            )
        found[module].append(_entry(config, family, path, leaf.shape, file_format))
    return tuple(entry for group in found.values() for entry in group)


def check_tensors(config: DecoderConfig, file_format: FileFormat, tensors: Tensors):
    """Raises unless the tensors are those of the model, each of its shape.

    Raises:
        ModelError: With every tensor that is missing, unexpected or misshapen.
    """
    family, sizes = family_named(config.family), axis_sizes(config)
    expected = {
        name: entry.layout.stored_shape(sizes)
        for entry in entries(config, file_format)
        for name in entry.names
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
    tied = _head_names(family, file_format) if config.tie_embeddings else frozenset()
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
    sizes, dtype = axis_sizes(config), np.dtype(dtype)
    where = shardings_for(config, shardings)
    params: dict[str, Any] = {}
    todo = list(entries(config, file_format))
    for entry in sorted(todo, key=lambda entry: -math.prod(entry.shape)):
        sharding = _sharding_of(where, entry.path)

        def read(index: Index, entry: Entry = entry) -> np.ndarray:
            return _read_part(entry, index, tensors, sizes, dtype)

        *parents, leaf = entry.path
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = _place(read, entry.shape, sharding)
    return params


class StoredTensor(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: In safetensors files.
        shape: As stored.
        dtype: Of the parameter that it is made of.
        make: Returns it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def stored_tensors(
    config: DecoderConfig, params: Mapping[str, Any]
) -> Iterator[StoredTensor]:
    """Yields the tensors of a Hugging Face folder, each made only when asked for.

    In the order of the model: embedding, layer after layer, head.

    Raises:
        ModelError: If the parameters are not those of the config.
    """
    sizes = axis_sizes(config)
    todo = entries(config, "hf")
    leaves = {entry.path: _leaf(params, entry) for entry in todo}

    def one(entry: Entry, layer: int) -> StoredTensor:
        leaf = leaves[entry.path]

        def make() -> np.ndarray:
            whole = np.asarray(leaf)
            part = whole[layer] if entry.stacked else whole
            return np.ascontiguousarray(entry.layout.to_stored(part, sizes))

        shape = entry.layout.stored_shape(sizes)
        return StoredTensor(entry.names[layer], shape, np.dtype(leaf.dtype), make)

    stacked = [index for index, entry in enumerate(todo) if entry.stacked]
    first, last = (stacked[0], stacked[-1] + 1) if stacked else (len(todo), len(todo))
    for entry in todo[:first]:
        yield one(entry, 0)
    for layer in range(config.num_layers):
        for entry in todo[first:last]:
            yield one(entry, layer)
    for entry in todo[last:]:
        yield one(entry, 0)


def _entry(
    config: DecoderConfig,
    family: Family,
    path: tuple[str, ...],
    shape: tuple[int, ...],
    file_format: FileFormat,
) -> Entry:
    module, is_bias = ".".join(path[:-1]), path[-1] == "bias"
    weight = next(weight for weight in family.weights if weight.module == module)
    if file_format == "hf":
        name, text, prefix = weight.hf, weight.layout, family.hf_layer
    else:
        name, prefix = weight.gguf, family.gguf_layer
        text = weight.gguf_layout or weight.layout
    layout = parse_layout(text)
    if is_bias:
        layout = layout.of_bias()
    name += ".bias" if is_bias else ".weight"
    if path[0] == _LAYERS:
        names = tuple(
            prefix.format(layer=layer) + name for layer in range(config.num_layers)
        )
    else:
        names = (name,)
    return Entry(path, names, layout, tuple(shape))


def _head_names(family: Family, file_format: FileFormat) -> frozenset[str]:
    """Returns the tensors that may repeat the embedding where it is the head too."""
    return frozenset(
        (weight.hf if file_format == "hf" else weight.gguf) + ".weight"
        for weight in family.weights
        if weight.module == "lm_head"
    )


def _read_part(
    entry: Entry, index: Index, tensors: Tensors, sizes: Sizes, dtype: np.dtype
) -> np.ndarray:
    layers, rest = (index[0], index[1:]) if entry.stacked else (slice(0, 1), index)
    names = entry.names[layers]
    buffer = np.empty((len(names), *(cut.stop - cut.start for cut in rest)), dtype)
    for row, name in zip(buffer, names, strict=True):

        def fetch(part: Index, name: str = name) -> np.ndarray:
            return tensors.read(name, part)

        row[...] = entry.layout.read(fetch, rest, sizes)
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


def _leaf(params: Mapping[str, Any], entry: Entry) -> Array:
    node: Any = params
    for key in entry.path:
        node = node.get(key) if isinstance(node, Mapping) else None
    shape = getattr(node, "shape", None)
    if shape != entry.shape:
        found = "is missing" if node is None else f"has shape {shape}"
        raise ModelError(
            f"the parameter {'.'.join(entry.path)} {found}; its config needs "
            f"{entry.shape}"
        )
    return node
