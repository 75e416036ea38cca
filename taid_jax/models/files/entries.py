"""Every parameter of a model and the tensors of a checkpoint that hold it."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params
from taid_jax.models.families import Family, family_named
from taid_jax.models.families.layout import (
    Fetch,
    FileFormat,
    Index,
    Layout,
    Part,
    Sizes,
    parse_layout,
)

_LAYERS = "layers"
_SPREAD = re.compile(r"\{(\w)\}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and where a checkpoint holds it.

    Attributes:
        path: Keys in the parameter tree.
        names: The tensors of each layer; there is but one layer if it is not stacked.
            Of a layer there is one tensor, or one for each index of the first stored
            axis if this is spread.
        layout: How they become the parameter (of one layer).
        shape: Of the whole parameter.
        spread: Whether the first stored axis is spread over several tensors.
        part: Which piece of the tensor it is; None when it is the whole.
        offset: What the stored numbers have too much.
    """

    path: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    layout: Layout
    shape: tuple[int, ...]
    spread: bool = False
    part: Part | None = None
    offset: float = 0.0

    @property
    def stacked(self) -> bool:
        """Whether the first axis of the parameter counts layers."""
        return self.path[0] == _LAYERS

    def tensor_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Returns the shape that each of its tensors has to have."""
        shape = self.layout.stored_shape(sizes)
        if self.part is not None:
            return self.part.whole_shape(shape, sizes)
        return shape[1:] if self.spread else shape

    def read(
        self,
        read_tensor: Callable[[str, Index], np.ndarray],
        layer: int,
        index: Index,
        sizes: Sizes,
    ) -> np.ndarray:
        """Returns a part of the parameter of a layer; of layer 0 if it is not stacked.

        `read_tensor` returns a part of a tensor by its name.
        """
        names = self.names[layer]

        def fetch_tensor(index: Index) -> np.ndarray:
            if self.spread:
                parts = [read_tensor(name, index[1:]) for name in names[index[0]]]
                return np.stack(parts)
            return read_tensor(names[0], index)

        fetch: Fetch = fetch_tensor
        if self.part is not None:
            fetch = self.part.fetch_from(fetch_tensor, sizes)
        found = self.layout.read(fetch, index, sizes)
        return found - np.asarray(self.offset, found.dtype) if self.offset else found


def axis_sizes(config: DecoderConfig) -> Sizes:
    """Returns the size of each axis letter that layouts use."""
    return {
        "v": config.padded_vocab_size,
        "d": config.d_model,
        "n": config.num_heads,
        "k": config.num_kv_heads,
        "h": config.head_dim,
        "f": config.mlp_dim,
        "p": config.max_position_embeddings,
        "c": 2,
        "r": config.head_dim // 2,
    }


def entries(config: DecoderConfig, file_format: FileFormat) -> tuple[Entry, ...]:
    """Returns every parameter of a model with the tensors that hold it.

    In the order in which the family declares them.
    """
    family = family_named(config.family)
    found: dict[str, list[Entry]] = {weight.module: [] for weight in family.weights}
    for path, shape in _parameters(config).items():
        entry = _entry(config, family, path, shape, file_format)
        found[".".join(path[:-1])].append(entry)
    return tuple(entry for group in found.values() for entry in group)


@functools.lru_cache(maxsize=16)
def _parameters(config: DecoderConfig) -> Mapping[tuple[str, ...], tuple[int, ...]]:
    """Returns path to shape of every parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return {
        tuple(str(key.key) for key in keys): tuple(leaf.shape) for keys, leaf in leaves
    }


def head_names(family: Family, file_format: FileFormat) -> frozenset[str]:
    """Returns the tensors that may repeat the embedding where it is the head too."""
    return frozenset(
        (weight.hf if file_format == "hf" else weight.gguf) + ".weight"
        for weight in family.weights
        if weight.module == "lm_head"
    )


def _entry(
    config: DecoderConfig,
    family: Family,
    path: tuple[str, ...],
    shape: tuple[int, ...],
    file_format: FileFormat,
) -> Entry:
    module, is_bias = ".".join(path[:-1]), path[-1] == "bias"
    sizes = axis_sizes(config)
    weight = next(weight for weight in family.weights if weight.module == module)
    if file_format == "hf":
        name, text, prefix, offset = weight.hf, weight.layout, family.hf_layer, 0.0
    else:
        name, prefix, offset = weight.gguf, family.gguf_layer, weight.gguf_offset
        text = weight.gguf_layout or weight.layout
    layout, part = parse_layout(text), weight.part
    if is_bias:
        layout, part = layout.of_bias(), part and part.of_bias()
    spread = _SPREAD.search(name)
    count = sizes[spread[1]] if spread else 1
    name += ".bias" if is_bias else ".weight"
    each = [_SPREAD.sub(str(index), name) for index in range(count)]
    if path[0] == _LAYERS:
        prefixes = [prefix.format(layer=layer) for layer in range(config.num_layers)]
    else:
        prefixes = [""]
    names = tuple(tuple(start + name for name in each) for start in prefixes)
    return Entry(path, names, layout, shape, bool(spread), part, offset)
