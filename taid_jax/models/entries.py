"""Every parameter of a model, and the tensors of a checkpoint that hold it."""

import dataclasses
from typing import Literal

import jax

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params
from taid_jax.models.errors import ModelError
from taid_jax.models.families import Family, family_named
from taid_jax.models.layout import Layout, Sizes, parse_layout

FileFormat = Literal["hf", "gguf"]
"""Whose names and layouts: Hugging Face's safetensors, or llama.cpp's GGUF."""

_LAYERS = "layers"


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
