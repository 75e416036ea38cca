"""Settings in YAML or JSON files, each laid over the files that it calls its base."""

import pathlib
from typing import Any

import yaml

from taid_jax.settings.checks import SettingsError
from taid_jax.settings.convert import Changes, apply_changes, read_changes
from taid_jax.settings.tree import Settings

BASE = "base"
"""The key whose value is a file, or a list of files, that the others are laid over."""


def read_settings(path: str | pathlib.Path, base: Settings | None = None) -> Settings:
    """Returns the settings in a YAML or JSON file, laid over `base`.

    The key `base` of a file names further files, by their path from that file's folder.
    They come first, in their order, each with its own bases before it; of several
    values of a setting the last one counts. What is out of range, or contradicts
    another setting, is looked for in the whole only.

    Raises:
        SettingsError: If a file cannot be read or holds something else, with its name.
    """
    changes: Changes = {}
    _lay_over(changes, pathlib.Path(path), ())
    return apply_changes(base or Settings(), changes)


def _lay_over(
    changes: Changes, path: pathlib.Path, asking: tuple[pathlib.Path, ...]
) -> None:
    """Lays a file and its bases over `changes`.

    Args:
        changes: Changed in place.
        path: Of the file.
        asking: The files that led here, the first one first.
    """
    chain = (*asking, path)
    if any(path.resolve() == other.resolve() for other in asking):
        names = " -> ".join(str(each) for each in chain)
        raise SettingsError(f"settings that are their own base: {names}")
    values = _read(path, asking)
    for name in _bases(values, path):
        _lay_over(changes, path.parent / name, chain)
    try:
        own = read_changes(values)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    for group, fields in own.items():
        changes.setdefault(group, {}).update(fields)


def _read(path: pathlib.Path, asking: tuple[pathlib.Path, ...]) -> dict[str, Any]:
    """Returns what a file holds."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        asked = f", which is a base of {asking[-1]}" if asking else ""
        raise SettingsError(
            f"cannot read the settings in {path}{asked}: {error}"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path}: need names and values, got {type(values).__name__}"
        )
    return values


def _bases(values: dict[str, Any], path: pathlib.Path) -> list[str]:
    """Takes the key `base` out of a file's values and returns the files it names."""
    named = values.pop(BASE, [])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name for name in names
    ):
        raise SettingsError(
            f"{path}: {BASE}: need a file or a list of files, got {named!r}"
        )
    return names
