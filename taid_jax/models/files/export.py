"""Hugging Face folders out: written aside, then given their name."""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import transformers
from jax import Array
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from taid_jax.errors import ModelError, explain, parsing, show
from taid_jax.files import folder_aside
from taid_jax.models.config import DecoderConfig
from taid_jax.models.families import write_config
from taid_jax.models.files.entries import Entry, axis_sizes, entries
from taid_jax.models.files.hf import CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS
from taid_jax.models.files.tokenizer import (
    NO_SPECIAL_IDS,
    Tokenizer,
    save_tokenizer,
    special_ids,
)
from taid_jax.models.files.vocabulary import resize_vocabulary

MAX_SHARD_BYTES = 4 << 30
"""A model above this size is written in several files."""

_DTYPES = ("float32", "bfloat16", "float16")
_METADATA = {"format": "pt"}  # Transformers 4 refuses files without it.
_OURS = re.compile(
    r"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|"
    r"(added_tokens|merges|special_tokens_map|tokenizer|tokenizer_config|vocab)\.\w+|"
    r"chat_template\.jinja"
)


def export_model(
    folder: str | os.PathLike[str],
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    *,
    generation: Mapping[str, object] | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Writes a model as a folder that `transformers` (4 and 5) loads.

    The padding of the vocabulary is left out: here it takes no part in any softmax and
    has no gradient, and outside nobody would know that it is padding. So the folder has
    `config.vocab_size` rows of embedding and head, and the logits of these are the
    same.

    All of it is written into a folder beside the asked one and flushed to the disk,
    then renamed: the name never stands for half a model.

    Args:
        folder: Made here; may exist when it is empty.
        config: The architecture.
        params: Its parameters.
        tokenizer: Saved too, with its chat template, when given.
        generation: Further keys of generation_config.json.
        dtype: Of the stored weights: float32, bfloat16 or float16; that of the
            parameters when None.
        max_shard_bytes: Weights above this size are cut into files of at most it.
        replace: Replace an older export of this name, once the new one is complete. A
            folder with any other file in it is never replaced.

    Raises:
        ModelError: If the folder holds something, cannot be written, the parameters are
            not those of the config, or a number is not finite as it would be stored.
    """
    with parsing(f"the model cannot be written to {show(str(folder))}", ModelError):
        folder = pathlib.Path(folder).expanduser().absolute()
        _refuse_to_overwrite(folder, replace=replace)
    if config.vocab_size < config.padded_vocab_size:
        params = resize_vocabulary(params, config.vocab_size)
        config = dataclasses.replace(config, padded_vocab_size=config.vocab_size)
    tensors = list(stored_tensors(config, params))
    kind = jnp.dtype(params["embed"]["embedding"].dtype if dtype is None else dtype)
    if kind.name not in _DTYPES:
        raise ModelError(f"weights are written as one of {_DTYPES}, got {kind.name}")
    # Null where nothing is known: absent, they would be the defaults of the class, ids
    # of another vocabulary.
    ids = special_ids(tokenizer) if tokenizer is not None else dict(NO_SPECIAL_IDS)
    generation = dict(generation or {})
    pad = generation.get("pad_token_id")
    if not (isinstance(pad, int) and 0 <= pad < config.vocab_size):
        # With one of the entries that were left out, transformers makes no model.
        generation.pop("pad_token_id", None)
    ids |= {key: value for key, value in generation.items() if "_token_id" in key}
    version = {"transformers_version": transformers.__version__}
    refuse = functools.partial(_refuse_to_overwrite, folder, replace=replace)
    try:
        with folder_aside(folder, refuse) as work:
            names = {"dtype": kind.name, "torch_dtype": kind.name}
            values = {**write_config(config), **ids, **names, "use_cache": True}
            _write_json(work / CONFIG, values | version)
            _write_json(work / GENERATION_CONFIG, {**generation, **ids} | version)
            _write_weights(work, tensors, kind, max_shard_bytes)
            if tokenizer is not None:
                save_tokenizer(tokenizer, work)
    except ModelError:
        raise
    # A path that cannot be is a ValueError: one with a NUL, or that no bytes stand for.
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"the model cannot be written to {show(str(folder))}: {explain(error)}; "
            "nothing was changed"
        ) from error


class StoredTensor(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: In safetensors files.
        shape: As stored.
        make: Returns it.
    """

    name: str
    shape: tuple[int, ...]
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

    def stored(entry: Entry, layer: int) -> np.ndarray:
        whole = np.asarray(leaves[entry.path])
        part = whole[layer] if entry.stacked else whole
        return entry.layout.to_stored(part, sizes)

    def tensors(group: list[Entry], layer: int) -> Iterator[StoredTensor]:
        # Several entries where one tensor holds the parameters of several modules.
        first, names = group[0], group[0].names[layer]
        for index, name in enumerate(names):

            def make(index: int = index) -> np.ndarray:
                pieces = [stored(entry, layer) for entry in group]
                if first.part is not None:
                    return np.ascontiguousarray(first.part.join(pieces, sizes))
                whole = pieces[0][index] if first.spread else pieces[0]
                return np.ascontiguousarray(whole)

            yield StoredTensor(name, first.tensor_shape(sizes), make)

    for stacked, run in itertools.groupby(_by_tensor(todo), lambda g: g[0].stacked):
        groups = list(run)
        for layer in range(config.num_layers if stacked else 1):
            for group in groups:
                yield from tensors(group, layer)


def _by_tensor(todo: Sequence[Entry]) -> list[list[Entry]]:
    """Returns the entries that are pieces of the same tensors together, in order."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in todo:
        groups.setdefault(entry.names[0], []).append(entry)
    return list(groups.values())


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


def _write_weights(
    work: pathlib.Path,
    tensors: Sequence[StoredTensor],
    kind: np.dtype,
    max_shard_bytes: int,
) -> None:
    named = {tensor.name: tensor for tensor in tensors}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda tensor: math.prod(tensor.shape) * kind.itemsize,
        filename_pattern=WEIGHTS.replace(".", "{suffix}."),
        max_shard_size=max_shard_bytes,
    )
    mode = (work / CONFIG).stat().st_mode
    for file, names in split.filename_to_tensors.items():
        with np.errstate(over="ignore"):
            arrays = {
                name: named[name].make().astype(kind, copy=False) for name in names
            }
        _refuse_nonfinite(arrays, kind)
        save_file(arrays, work / file, metadata=_METADATA)
        # safetensors would let nobody but the owner read it.
        (work / file).chmod(mode)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(work / INDEX, index)


def _refuse_nonfinite(arrays: Mapping[str, np.ndarray], kind: np.dtype) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ModelError(
                f"{name} has numbers that are not finite as {kind.name} (beyond "
                f"{float(jnp.finfo(kind).max):g}, or no numbers); the model was not "
                "written. If it is sound, write it with another dtype (--export-dtype)"
            )


def _write_json(path: pathlib.Path, values: Mapping[str, object]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _refuse_to_overwrite(folder: pathlib.Path, *, replace: bool) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise ModelError(f"{folder} is there and no folder; choose another name")
    foreign = [
        entry.name for entry in folder.iterdir() if not _OURS.fullmatch(entry.name)
    ]
    if foreign or (any(folder.iterdir()) and not replace):
        raise ModelError(
            f"{folder} is not empty (it has {', '.join(sorted(foreign)[:3]) or CONFIG})"
            "; the model is not written over what is there. Choose another folder"
        )
