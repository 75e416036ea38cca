"""Reading the parameters of a model from the tensors of a checkpoint."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding
from jax.typing import DTypeLike

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig
from taid_jax.models.families import Buffer, buffer_kind, family_named
from taid_jax.models.families.fields import PASS_OVER, shown_name
from taid_jax.models.families.layout import FileFormat, Index, Sizes
from taid_jax.models.files.entries import Entry, axis_sizes, entries, head_names
from taid_jax.models.memory import check_fits, params_need, sharding_of
from taid_jax.models.rope import rope_frequencies

Shardings = Sharding | Mapping[str, Any] | Callable[[DecoderConfig], Any]
"""One sharding for all parameters, a tree of them, or what makes the tree."""

_MOST_LINES = 8
_BLOCK = 1 << 24
"""Numbers of a tensor that are compared at once."""


@runtime_checkable
class Tensors(Protocol):
    """The tensors of a checkpoint, read one at a time or in parts."""

    file_format: ClassVar[FileFormat]

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


def own_head(config: DecoderConfig, tensors: Tensors) -> DecoderConfig:
    """Returns the settings, untied where the file has a head unlike its embedding.

    As transformers does: a head that repeats the embedding says nothing new, another
    one goes before what the config says. They are compared in blocks of rows.
    """
    family, shapes = family_named(config.family), tensors.shapes
    [head] = head_names(family, tensors.file_format)
    [table] = [
        entry
        for entry in entries(config, tensors.file_format)
        if entry.path[0] == "embed"
    ]
    [[embedding]] = table.names
    if not config.tie_embeddings or not {head, embedding} <= shapes.keys():
        return config
    shape = shapes[head]
    same = shapes[embedding] == shape and len(shape) == 2
    step = max(1, _BLOCK // max(1, shape[-1])) if same else 1
    for start in range(0, shape[0] if same else 0, step):
        rows = (slice(start, min(start + step, shape[0])), slice(0, shape[1]))
        left, right = (
            tensors.read(name, rows).astype(np.float32) for name in (embedding, head)
        )
        if not np.array_equal(left, right):
            same = False
            break
    return config if same else dataclasses.replace(config, tie_embeddings=False)


def check_tensors(
    config: DecoderConfig,
    tensors: Tensors,
    unknown: list[str] | None = None,
) -> None:
    """Raises unless the tensors are those of the model, each of its shape.

    All differences are counted, and the first of each kind named. Tensors that follow
    from the settings (masks, rotary frequencies) are compared with what those give.
    `unknown` takes those that differ, and those that no parameter is made of; they are
    refused when it is None.

    Raises:
        ModelError: With the tensors that are missing, unexpected or misshapen.
    """
    family, sizes = family_named(config.family), axis_sizes(config)
    file_format = tensors.file_format
    expected = {
        name: entry.tensor_shape(sizes)
        for entry in entries(config, file_format)
        for names in entry.names
        for name in names
    }
    shapes = tensors.shapes
    missing = [
        f"missing: {name}, shape {shape}"
        for name, shape in expected.items()
        if name not in shapes
    ]
    misshapen = [
        f"wrong shape: {name} has {shapes[name]}, the config needs {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    known = family.gguf_settings if file_format == "gguf" else frozenset()
    if config.tie_embeddings:  # The head is the embedding again; `own_head` looks.
        known |= head_names(family, file_format)
    strange = {}
    for name, shape in shapes.items():
        if name in expected or name in known:
            continue
        kind = buffer_kind(family, name) if file_format == "hf" else None
        if kind is None:
            strange[name] = f"unexpected: {shown_name(name)}, shape {shape}"
        elif not _follows(config, kind, tensors.read(name, ())):
            strange[name] = f"not what the config gives: {shown_name(name)}"
    if unknown is not None:
        unknown += map(shown_name, strange)
        strange = {}
    groups = missing, misshapen, list(strange.values())
    if count := sum(map(len, groups)):
        lines = []
        for group in groups:
            lines += group[:_MOST_LINES]
            if (more := len(group) - _MOST_LINES) > 0:
                lines.append(f"{group[0].partition(':')[0]}: {more} more")
        if not missing and not misshapen:
            lines.append(PASS_OVER)
        raise ModelError(
            f"the weights in {tensors.origin} are not those of its config "
            f"({count} differences):\n  " + "\n  ".join(lines)
        )


def _follows(config: DecoderConfig, kind: Buffer, found: np.ndarray) -> bool:
    """Returns whether a tensor holds what follows from the settings."""
    if kind == "masked_score":
        return found.size == 1 and bool(found.astype(np.float64).max() <= -1e4)
    if kind == "causal_mask":
        length = found.shape[-1] if found.ndim else 0
        if found.shape != (1, 1, length, length):
            return False
        return np.array_equal(found[0, 0], np.tri(length, dtype=found.dtype))
    # Scaled or not, as several versions of transformers kept them; rounded to bfloat16
    # perhaps, and to float16, in which the small ones have few digits.
    ropes = {rope for rope in (config.rope, config.local_rope) if rope is not None}
    ropes |= {dataclasses.replace(rope, kind="default") for rope in ropes}
    found = found.astype(np.float32)
    return any(
        found.shape == given.shape and np.allclose(found, given, rtol=5e-3, atol=1e-7)
        for rope in ropes
        for long in {False, rope.kind == "longrope"}
        for given in [rope_frequencies(rope, config.head_dim, long=long)]
    )


def shardings_for(config: DecoderConfig, shardings: Shardings | None) -> Any:
    """Returns one sharding, or a tree of them, or None for the default device."""
    return shardings(config) if callable(shardings) else shardings


def load_params(
    config: DecoderConfig,
    tensors: Tensors,
    *,
    dtype: DTypeLike,
    shardings: Shardings | None = None,
    unknown: list[str] | None = None,
) -> dict[str, Any]:
    """Returns the parameter tree, each array placed as it is read.

    A stacked parameter is filled layer by layer into the buffer that becomes the array,
    the largest parameters first, so that at no time more than the model and one more
    parameter are in memory. With shardings, each part is read on its own, and only the
    parts that this process's devices hold.

    Raises:
        ModelError: If the tensors are not those of the model, cannot be read, or do not
            fit in memory.
    """
    check_tensors(config, tensors, unknown)
    sizes, kind = axis_sizes(config), jnp.dtype(dtype)
    where = shardings_for(config, shardings)
    check_fits(params_need(tensors.origin, config, kind, where))
    params: dict[str, Any] = {}
    todo = entries(config, tensors.file_format)
    for entry in sorted(todo, key=lambda entry: -math.prod(entry.shape)):
        sharding = sharding_of(where, entry.path)

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
    parts: dict[str, np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        cuts = zip(index or (), shape, strict=True)
        whole = tuple(slice(*cut.indices(size)[:2]) for cut, size in cuts)
        # Copies of a part are read once.
        if (key := str(whole)) not in parts:
            parts[key] = read(whole)
        return parts[key]

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))
