"""Hugging Face folders in: config.json and safetensors, whole or in shards."""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError, safe_open

from taid_jax.models.config import DecoderConfig
from taid_jax.models.errors import ModelError
from taid_jax.models.families import Family, is_ignored, read_config
from taid_jax.models.fields import read_json
from taid_jax.models.layout import Index

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHERS = ("*.h5", "*.msgpack", "*.onnx")


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
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, pathlib.Path]
    stored_names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a part of a tensor.

        Raises:
            ModelError: If its file cannot be read any more.
        """
        path, stored = self.files[name], self.stored_names.get(name, name)
        try:
            with safe_open(path, framework="np") as file:
                if not index:
                    return file.get_tensor(stored)
                return file.get_slice(stored)[index]
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error


def read_folder_config(folder: pathlib.Path) -> DecoderConfig:
    """Returns the architecture in a folder's config.json.

    Raises:
        ModelError: If the folder has none that the decoder can follow.
    """
    path = folder / CONFIG
    if not path.is_file():
        there = sorted(entry.name for entry in folder.iterdir())[:10]
        holds = f"holds {', '.join(there)}" if there else "is empty"
        raise ModelError(
            f"{folder} has no config.json, so it is no Hugging Face model folder; it "
            f"{holds}. Give the folder that `save_pretrained` wrote, or a .gguf file"
        )
    return read_config(read_json(path), str(path))


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
    if (folder / WEIGHTS).is_file():
        listed = None
        paths = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        listed = _read_index(folder / INDEX)
        paths = [folder / name for name in sorted(set(listed.values()))]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ModelError(
                f"{folder / INDEX} names files that are not there: "
                f"{', '.join(missing)}; fetch the whole model again"
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
            shapes[name], files[name], dtypes[name] = shape, path, dtype
    for name, file in (listed or {}).items():
        if name not in files:
            problems.append(f"{name} is not in {file}, where the index has it")
    stored = {} if family is None else _full_names(shapes, family)
    for name, other in stored.items():
        shapes[name], files[name] = shapes.pop(other), files.pop(other)
        dtypes[name] = dtypes.pop(other)
    problems += [
        f"{stored.get(name, name)} in {files[name].name} is {dtype}"
        for name, dtype in dtypes.items()
        if dtype not in _FLOATS and not (family and is_ignored(family, name))
    ]
    if problems:
        raise ModelError(
            f"the weights in {folder} cannot be used (tensors have to be there, and "
            f"{', '.join(_FLOATS)}):\n  " + "\n  ".join(problems)
        )
    return FolderTensors(str(folder), shapes, files, stored)


def _full_names(shapes: Mapping[str, object], family: Family) -> dict[str, str]:
    """Returns full name to name in the file, where the files leave the prefix out."""
    start = family.hf_layer.partition(".")[0] + "."
    if any(name.startswith(start) for name in shapes):
        return {}
    outside = {
        weight.hf + end
        for weight in family.weights
        if not weight.module.startswith("layers.") and not weight.hf.startswith(start)
        for end in (".weight", ".bias")
    }
    return {start + name: name for name in shapes if name not in outside}


def _read_header(path: pathlib.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with safe_open(path, framework="np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (tuple(part.get_shape()), part.get_dtype())
                for name, part in parts.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_index(path: pathlib.Path) -> dict[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{path} has no weight_map from tensors to files")
    for name, file in listed.items():
        plain = isinstance(file, str) and pathlib.PurePath(file).name == file
        if not plain or "\\" in file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{path} has {name} in {file!r}; only .safetensors files in the same "
                "folder are read"
            )
    return listed


def _no_weights(folder: pathlib.Path) -> ModelError:
    def found(patterns: tuple[str, ...]) -> str:
        paths = [path for pattern in patterns for path in folder.glob(pattern)]
        return ", ".join(sorted(path.name for path in paths))

    if pickles := found(_PICKLES):
        return ModelError(
            f"{folder} has its weights as pickles only ({pickles}), which can run any "
            "code when they are loaded; they are refused. If you trust them, convert "
            "them once: `AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(other_folder)` in transformers with PyTorch, and give "
            "the other folder"
        )
    if (folder / "adapter_config.json").is_file():
        return ModelError(
            f"{folder} holds an adapter, not a model; merge it into its base model "
            "first (`merge_and_unload` in peft) and save that"
        )
    others = found(("*.safetensors", "*.gguf", *_OTHERS)) or "none of any kind"
    return ModelError(
        f"{folder} has no weights: need {WEIGHTS}, or {INDEX} with its shards; found "
        f"{others}. A student with random weights is asked for by its own setting"
    )


def _damaged(path: pathlib.Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path} is damaged or no safetensors file ({error}); fetch it again"
    )
