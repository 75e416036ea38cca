"""Hugging Face folders in: config.json and safetensors, whole or in shards."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import numpy as np
from safetensors import safe_open

from taid_jax.errors import ModelError, parsing, show
from taid_jax.models.config import DecoderConfig
from taid_jax.models.families import Family, buffer_kind, read_config
from taid_jax.models.families.fields import read_json, shown_name
from taid_jax.models.families.layout import FileFormat, Index

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

_MOST_LINES = 20
_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHERS = ("*.h5", "*.msgpack", "*.onnx")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What PyTorch's compiler and others put into names, at any place of them."""


@dataclasses.dataclass(frozen=True)
class FolderTensors:
    """The tensors of a folder's safetensors files.

    A file is opened for each read and closed after it, so that what was read of it does
    not stay in memory; only the part that is asked for is read.

    Attributes:
        origin: The folder, for messages.
        shapes: The shape of each tensor.
        files: The file of each tensor.
        stored_names: What the files call those that they call by another name.
        notes: What was made of the names, a line each.
    """

    file_format: ClassVar[FileFormat] = "hf"
    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, pathlib.Path]
    stored_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a part of a tensor.

        Raises:
            ModelError: If its file cannot be read any more.
        """
        path, stored = self.files[name], self.stored_names.get(name, name)
        with _sound(path), safe_open(path, framework="np") as file:
            if not index:
                return file.get_tensor(stored)
            return file.get_slice(stored)[index]


def read_folder_config(
    source: pathlib.Path, unknown: list[str] | None = None
) -> DecoderConfig:
    """Returns the architecture that a folder's config.json, or that file, describes.

    Raises:
        ModelError: If the folder has none that the decoder can follow.
    """
    path = source / CONFIG if source.is_dir() else source
    if not os.path.lexists(path):
        there = sorted(entry.name for entry in source.iterdir())[:10]
        holds = f"holds {', '.join(there)}" if there else "is empty"
        raise ModelError(
            f"{source} has no config.json, so it is no Hugging Face model folder; it "
            f"{holds}. Give the folder that `save_pretrained` wrote, or a .gguf file"
        )
    return read_config(read_json(path), str(path), unknown=unknown)


def has_weights(folder: pathlib.Path) -> bool:
    """Returns whether all files of a folder's weights are there."""
    if os.path.isfile(folder / WEIGHTS):
        return True
    return os.path.isfile(folder / INDEX) and all(
        os.path.isfile(folder / name)
        for name in set(_read_index(folder / INDEX).values())
    )


def open_folder(folder: pathlib.Path, family: Family | None = None) -> FolderTensors:
    """Returns the tensors of a folder; only the headers of its files are read.

    Args:
        folder: Holds the files.
        family: Of the model that they belong to: its tensors may also be called by
            their names in the model without a head, as some published files do.

    Raises:
        ModelError: If there are no safetensors, a file is damaged, or the index does
            not fit the files.
    """
    # Of pipes, which never end, and of names too long for the file system: no files.
    if os.path.isfile(folder / WEIGHTS):
        listed = None
        paths = [folder / WEIGHTS]
    elif os.path.isfile(folder / INDEX):
        listed = _read_index(folder / INDEX)
        paths = [folder / name for name in sorted(set(listed.values()))]
        if missing := [path.name for path in paths if not os.path.isfile(path)]:
            raise ModelError(
                f"{folder / INDEX} names files that are not there: "
                f"{_listed(missing)}; fetch the whole model again"
            )
    else:
        raise _no_weights(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, pathlib.Path] = {}
    dtypes: dict[str, str] = {}
    problems: list[str] = []
    for path in paths:
        for name, (shape, dtype) in _read_header(path).items():
            if listed is not None and listed.get(name, path.name) != path.name:
                continue  # Another shard has the one that counts.
            if name in files:
                both = f"{files[name].name} and {path.name}"
                problems.append(
                    f"{shown_name(name)} is in {both}, and not in the index"
                )
            shapes[name], files[name], dtypes[name] = shape, path, dtype
    for name, file in (listed or {}).items():
        if name not in files:
            problems.append(
                f"{shown_name(name)} is not in {file}, where the index has it"
            )
    full, notes = {name: name for name in shapes}, ()
    if family is not None:
        full, notes = _full_names(full, family)
    problems += [
        f"{shown_name(name)} in {files[name].name} is {dtype}"
        for name, dtype in dtypes.items()
        if dtype not in _FLOATS and not (family and buffer_kind(family, full[name]))
    ]
    if problems:
        count, shown = len(problems), problems[:_MOST_LINES]
        shown += [f"... and {count - _MOST_LINES} more"] * (count > _MOST_LINES)
        raise ModelError(
            f"the weights in {folder} cannot be used (tensors have to be there, and "
            f"{', '.join(_FLOATS)}):\n  " + "\n  ".join(shown)
        )
    return FolderTensors(
        str(folder),
        {full[name]: shape for name, shape in shapes.items()},
        {full[name]: path for name, path in files.items()},
        {full[name]: name for name in shapes if full[name] != name},
        notes,
    )


def _full_names(
    names: Mapping[str, str], family: Family
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Returns name in the file to the family's name, and what to say of it.

    Training tools put their own words before or into all names; some published files
    leave out the first word of the family's names.
    """
    layer = family.hf_layer.partition("{")[0]
    start = layer.partition(".")[0] + "."
    short = layer.removeprefix(start)
    full, notes = dict(names), []
    for wrapper in _WRAPPERS:
        if any(wrapper in name for name in names):
            full = {name: text.replace(wrapper, "") for name, text in full.items()}
            notes.append(f"tensor names: {wrapper!r} was left out of them")
    if prefix := _prefix(list(full.values()), (layer, short)):
        full = {name: text.removeprefix(prefix) for name, text in full.items()}
        notes.append(f"tensor names: all begin with {prefix!r}, which was left out")
    starts = {
        one for text in full.values() for one in (start, short) if text.startswith(one)
    }
    if starts == {short}:
        outside = {
            weight.hf + end
            for weight in family.weights
            if not weight.module.startswith("layers.")
            and not weight.hf.startswith(start)
            for end in (".weight", ".bias")
        }
        full = {
            name: text if text in outside else start + text
            for name, text in full.items()
        }
    if len(set(full.values())) < len(full):
        return names, ()  # Two tensors of one name: they are listed as they are.
    return full, tuple(notes)


def _prefix(names: Sequence[str], layers: Sequence[str]) -> str:
    """Returns what stands before the family's names, which the first layer shows."""
    for layer in layers:
        for name in names:
            at = f".{name}".find(f".{layer}0.")
            if at >= 0:
                prefix = name[:at]
                return prefix if all(one.startswith(prefix) for one in names) else ""
    return ""


def _read_header(path: pathlib.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    with _sound(path), safe_open(path, framework="np") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: (tuple(part.get_shape()), part.get_dtype())
            for name, part in parts.items()
        }


def _read_index(path: pathlib.Path) -> dict[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{path} has no weight_map from tensors to files")
    for name, file in listed.items():
        plain = isinstance(file, str) and pathlib.PurePath(file).name == file
        if not plain or "\\" in file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{path} has {shown_name(name)} in {show(file)}; only .safetensors "
                "files in the same folder are read"
            )
    return listed


def _no_weights(folder: pathlib.Path) -> ModelError:
    def found(patterns: tuple[str, ...]) -> str:
        paths = [path for pattern in patterns for path in folder.glob(pattern)]
        return _listed(sorted(path.name for path in paths))

    if pickles := found(_PICKLES):
        return ModelError(
            f"{folder} has its weights as pickles only ({pickles}), which can run any "
            "code when they are loaded; they are refused. If you trust them, convert "
            "them once: `AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(other_folder)` in transformers with PyTorch, and give "
            "the other folder"
        )
    if (folder / ADAPTER).is_file():
        return ModelError(
            f"{folder} holds an adapter, not a model; merge it into its base model "
            "first (`merge_and_unload` in peft) and save that"
        )
    others = found(("*.safetensors", "*.gguf", *_OTHERS)) or "none of any kind"
    return ModelError(
        f"{folder} has no weights: need {WEIGHTS}, or {INDEX} with its shards; found "
        f"{others}. A student with random weights is asked for by its own setting"
    )


def _sound(path: pathlib.Path) -> AbstractContextManager[None]:
    """Turns what reading a file raises into an error that names it."""
    return parsing(
        f"{path} is damaged or no safetensors file, fetch it again", ModelError
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(shown_name, names[:10]))
    return shown + f" and {len(names) - 10} more" * (len(names) > 10)
