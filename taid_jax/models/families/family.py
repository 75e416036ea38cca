"""What a family of models declares: its settings, its weights, and what it ignores."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from taid_jax.models.config import DecoderConfig
from taid_jax.models.families.fields import Fields, Required
from taid_jax.models.families.layout import Part

Value = int | float | bool | str | None
Got = Mapping[str, Any]
"""Fields of `DecoderConfig` that were read so far."""

Default = Value | Required | Callable[[Got], int]
"""A value, REQUIRED, or a function of the settings that stand before this one."""

Buffer = Literal["rope_frequencies", "causal_mask", "masked_score"]
"""Angles per position of rotary positions; what a token sees; the score of the rest."""

ACTIVATIONS: Mapping[object, Value] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
}
"""Names of `transformers` -> `activation` of `DecoderConfig`."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of `DecoderConfig` and its key in config.json.

    Attributes:
        field: Name of the field; its type there is the type that the file must have.
            Null means absent, unless the field may be None.
        key: Name in config.json; None when the default is all there is.
        default: What `transformers` takes where config.json says nothing.
        words: What the file says -> what the field is then, where they differ; of
            several for the same, the first is written.
    """

    field: str
    key: str | None
    default: Default
    words: Mapping[Any, Value] | None = None


class Group(NamedTuple):
    """Keys of config.json that are read and written together.

    Attributes:
        read: Returns the fields of `DecoderConfig` that they give, from the file and
            the fields read before; problems are left with the `Fields`.
        write: Returns the keys for an architecture.
    """

    read: Callable[[Fields, Got], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, object]]


@dataclasses.dataclass(frozen=True)
class Weight:
    """The parameters of one module and the tensors that hold them.

    A module's kernel, scale or embedding is stored under its name with `.weight`
    appended, its bias (where the model has one) with `.bias`.

    Attributes:
        module: Path of the module in the parameter tree, joined by dots. Parameters
            under `layers` are stacked: there is one tensor for each layer.
        hf: Name in safetensors files; without the family's prefix if it is in a layer.
            An axis letter in braces, as in `norms.{n}`, is an axis of the layout's left
            side that is spread over as many tensors; it has to be the first.
        gguf: The same in GGUF files; anything for a family without them.
        layout: Axes of the stored `.weight` and of the parameter (see `layout.py`):
            v vocabulary, d model, n query heads, k key/value heads, h head width,
            f MLP, p learned positions; a head's width is also `c r`, two halves of r
            rotary pairs.
        gguf_layout: The same for GGUF, where llama.cpp stores another order.
        part: Which piece of the stored tensor it is, where one tensor holds several
            modules side by side; the layout is then that of the piece.
        gguf_offset: What llama.cpp adds to every number of it.
    """

    module: str
    hf: str
    gguf: str
    layout: str
    gguf_layout: str | None = None
    part: Part | None = None
    gguf_offset: float = 0.0


def side_by_side(
    weights: Sequence[Weight],
    hf: str,
    gguf: str,
    sizes: tuple[str, ...],
    **options: Any,
) -> tuple[Weight, ...]:
    """Returns weights that one tensor holds, as its pieces in this order.

    `hf` and `gguf` are the tensor's names; sizes and options those of `Part`.
    """
    return tuple(
        dataclasses.replace(each, hf=hf, gguf=gguf, part=Part(n, sizes, **options))
        for n, each in enumerate(weights)
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models that the decoder can be.

    Attributes:
        name: `model_type` in config.json, and `family` in `DecoderConfig`.
        architecture: The class in `transformers`, in `architectures` of config.json.
        settings: What config.json may set.
        groups: What it sets with several keys together: rotary positions, windows.
        constants: Fields of `DecoderConfig` that all models of the family share.
        fixed: Keys that ask for something the decoder does in one way only, with the
            values that mean this way; the first is written on export.
        harmless: Keys that change nothing that is computed here.
        weights: All modules that a model of the family may have.
        hf_layer: Prefix of a layer's tensors in safetensors files.
        gguf_layer: The same in GGUF files.
        buffers: Pattern of tensors of safetensors files that follow from the settings,
            and what they hold: they are compared, then left out.
        gguf_settings: Tensors of GGUF files that settings are read from.
        gguf: `general.architecture` in GGUF files; None when there are none.
    """

    name: str
    architecture: str
    settings: tuple[Setting, ...]
    groups: tuple[Group, ...]
    weights: tuple[Weight, ...]
    fixed: Mapping[str, tuple[object, ...]] = dataclasses.field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    constants: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    hf_layer: str = "model.layers.{layer}."
    gguf_layer: str = "blk.{layer}."
    buffers: Mapping[str, Buffer] = dataclasses.field(default_factory=dict)
    gguf_settings: frozenset[str] = frozenset()
    gguf: str | None = None
