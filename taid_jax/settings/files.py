"""Settings in YAML or JSON files, each laid over the files that it calls its base."""

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any, ClassVar

import yaml

from taid_jax.errors import parsing, shorten, show
from taid_jax.settings.checks import SettingsError, need
from taid_jax.settings.convert import Changes, apply_changes, read_changes, to_dict
from taid_jax.settings.tree import Settings

BASE = "base"
"""The key whose value is a file, or a list of files, that the others are laid over."""

_MAX_BYTES = 2**17
_MAX_FILES = 64


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
    _lay_over(changes, pathlib.Path(path), (), done=[])
    return apply_changes(base or Settings(), changes)


def to_yaml(settings: Settings) -> str:
    """Returns the settings as YAML that `read_settings` reads."""
    return yaml.dump(to_dict(settings), Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML text; whatever the parser raises comes through.

    Numbers are those of YAML 1.2: 1e-4 is one, and 010, 1:30 and dates are text. A name
    that is given twice is an error, and `<<`, which can grow without end, is a name.
    """
    return yaml.load(text, Loader=_Loader)  # A SafeLoader.


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        return _unique(
            (
                self.construct_object(key, deep=True),
                self.construct_object(value, deep=deep),
            )
            for key, value in node.value
        )


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar = {}


for _tag, _pattern, _first in (
    ("bool", "(?i:yes|no|true|false|on|off)", "yYnNtTfFoO"),
    ("int", "[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?i:inf)|\.(?i:nan)",
        "-+0123456789.",
    ),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), list(_first)
        )


def _unique(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Returns pairs as a dict.

    Raises:
        ValueError: If a key comes twice: one of its values would go unseen.
    """
    values: dict[Any, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{show(key)} is given twice")
        values[key] = value
    return values


def _lay_over(
    changes: Changes,
    path: pathlib.Path,
    asking: tuple[pathlib.Path, ...],
    done: list[pathlib.Path],
) -> None:
    """Lays a file and its bases over `changes`.

    Args:
        changes: Changed in place.
        path: Of the file.
        asking: The files that led here, the first one first.
        done: All files that were read; this one is added.
    """
    shown = shorten(str(path))
    asked = f", which is a base of {shorten(str(asking[-1]))}" if asking else ""
    with parsing(f"cannot read the settings in {shown}{asked}", SettingsError):
        if any(path.resolve() == other.resolve() for other in asking):
            names = " -> ".join(each.name for each in (*asking, path))
            raise SettingsError(f"settings that are their own base: {names}")
        if len(done) == _MAX_FILES:
            raise ValueError(f"more than {_MAX_FILES} files, bases of bases")
        done.append(path)
        values = _read(path)
    try:
        names = _bases(values)
        own = read_changes(values)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    for name in names:
        _lay_over(changes, path.parent / name, (*asking, path), done)
    for group, fields in own.items():
        changes.setdefault(group, {}).update(fields)


def _read(path: pathlib.Path) -> dict[Any, Any]:
    """Returns what a file holds."""
    if path.exists() and not path.is_file():  # A pipe would be waited for without end.
        raise ValueError("it is no file")
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"settings have at most {_MAX_BYTES} bytes")
    text = data.decode("utf-8-sig")
    if path.suffix == ".json":
        values = json.loads(text, object_pairs_hook=_unique)
    else:
        values = parse_yaml(text)
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"need names and values, got {type(values).__name__}")
    return values or {}


def _bases(values: dict[Any, Any]) -> list[str]:
    """Takes the key `base` out of a file's values and returns the files it names."""
    named = values.pop(BASE, [])
    names = [named] if isinstance(named, str) else named
    texts = isinstance(names, list) and all(isinstance(n, str) and n for n in names)
    need(BASE, named, texts, "a file or a list of files")
    return names
