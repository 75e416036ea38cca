"""Reads a folder of recorded numbers, and names what is missing or misshapen in it."""

import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
"""The project's own recordings; `golden/README.md` describes the format."""


class RecordingError(ValueError):
    """A folder of recordings does not hold what its format says."""


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file; nothing in it is unpickled.

    Raises:
        RecordingError: If the file is missing, or is not an .npz of plain arrays.
    """
    if not path.is_file():
        raise RecordingError(f"need the recording {path}, found no such file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RecordingError(
            f"{path} is not an .npz of plain arrays: {error}"
        ) from error


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a compressed .npz file."""
    named: dict[str, Any] = dict(arrays)
    np.savez_compressed(path, **named)


def check_arrays(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, Sequence[int]],
) -> None:
    """Checks that arrays are there and have their shapes.

    Raises:
        RecordingError: Naming every array that is missing or misshapen.
    """
    missing = sorted(name for name in shapes if name not in arrays)
    misshapen = [
        f"{name} {arrays[name].shape}, need {tuple(shape)}"
        for name, shape in shapes.items()
        if name in arrays and arrays[name].shape != tuple(shape)
    ]
    problems = []
    if missing:
        problems.append("missing arrays: " + ", ".join(missing))
    if misshapen:
        problems.append("misshapen arrays: " + "; ".join(misshapen))
    if problems:
        raise RecordingError(f"{path}: " + "; ".join(problems))


def load_json(path: pathlib.Path) -> dict:
    """Returns the object of a JSON file.

    Raises:
        RecordingError: If the file is missing or not a JSON object.
    """
    if not path.is_file():
        raise RecordingError(f"need the recording {path}, found no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordingError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RecordingError(
            f"{path}: need a JSON object, got {type(content).__name__}"
        )
    return content


def case_names(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the names that the array `cases` lists.

    Raises:
        RecordingError: If there is no such array of names.
    """
    if "cases" not in arrays:
        raise RecordingError(f"{path}: missing arrays: cases")
    return [str(name) for name in np.atleast_1d(arrays["cases"])]
