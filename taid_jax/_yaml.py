"""YAML 1.2's numbers in a safe loader and dumper; names that come twice are errors."""

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any, ClassVar

import yaml

from taid_jax.errors import show

_MAX_BYTES = 2**17


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML text; whatever the parser raises comes through.

    Numbers are those of YAML 1.2: 1e-4 is one, and 010, 1:30 and dates are text. A name
    that is given twice is an error, and `<<`, which can grow without end, is a name.
    """
    return yaml.load(text, Loader=_Loader)  # A SafeLoader.


def dump_yaml(values: Any) -> str:
    """Returns plain values as YAML that `parse_yaml` reads."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def read_values(path: pathlib.Path) -> dict[Any, Any]:
    """Returns the names and values of a YAML or JSON file.

    Raises:
        Exception: Whatever the file system or a parser raises.
    """
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
    values: dict[Any, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{show(key)} is given twice")
        values[key] = value
    return values
