"""Bounds that settings declare on their fields, and the one place that checks them."""

import dataclasses
import functools
import math
import operator
import os
import pathlib
import struct
import types
import typing
import unicodedata
from collections.abc import Mapping
from typing import Any, Literal

from taid_jax.errors import InputError, parsing, show

_MOST = 2**31 - 1
"""Integers end here where no other bound is declared: the programs count in int32."""

_MAX_TEXT, _MAX_NAME = 4096, 255
"""Bytes of a path and of each name in it: what file systems take."""


class SettingsError(InputError):
    """A setting is out of range, unknown, or contradicts another."""


def need(name: str, value: object, holds: bool, what: str) -> None:
    """Raises unless a setting holds.

    Args:
        name: Of the setting.
        value: Given.
        holds: Whether it can be used.
        what: That is needed, for the message.

    Raises:
        SettingsError: If it does not hold.
    """
    if not holds:
        raise SettingsError(f"{name}: need {what}, got {show(value)}")


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def bounded(default: Any, **bounds: float | int) -> Any:
    """Returns a dataclass field that holds numbers within bounds.

    Args:
        default: Of the field.
        **bounds: `ge` or `gt`, then `le` or `lt`, as in the module `operator`.
    """
    return dataclasses.field(default=default, metadata=bounds)


class Checked:
    """A frozen dataclass whose fields are checked when it is made."""

    def __post_init__(self):
        for name, (kind, field) in typed_fields(type(self)).items():
            value = cast(name, getattr(self, name), kind)
            if isinstance(value, str):
                filled = value != "" or field.default == ""
                need(name, value, filled, "a text that is not empty")
                check_text(name, value)
            elif type(value) in (int, float):
                check_number(name, value, field.metadata)
            object.__setattr__(self, name, value)  # An int became the float it means.


@functools.cache
def typed_fields(group: type) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Returns type and declaration of each field of a dataclass."""
    hints = typing.get_type_hints(group)
    fields = dataclasses.fields(typing.cast(Any, group))
    return {field.name: (hints[field.name], field) for field in fields}


def cast(name: str, value: Any, kind: Any) -> Any:
    """Returns a value as a setting's type.

    Args:
        name: Of the setting.
        value: Given; an int will do for a float, and nothing else for anything else.
        kind: A type, a `Literal`, or a union of them.

    Raises:
        SettingsError: If it is of another type.
    """
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    wanted = []
    for choice in choices:
        if typing.get_origin(choice) is Literal:
            known = typing.get_args(choice)
            if isinstance(value, str) and value in known:
                return value
            wanted.append(f"one of {', '.join(known)}")
            continue
        if choice is float and type(value) is int:
            try:
                return float(value)
            except OverflowError:
                return math.inf if value > 0 else -math.inf
        if type(value) is choice:
            return value
        wanted.append("none" if choice is types.NoneType else choice.__name__)
    raise SettingsError(f"{name}: need {' or '.join(wanted)}, got {show(value)}")


def check_number(
    name: str, value: float | int, bounds: Mapping[str, float | int]
) -> None:
    """Raises unless a number, as it is and in float32, is finite and within bounds.

    Args:
        name: Of the setting.
        value: Given; integers end at 2**31 where `bounds` have no other end.
        bounds: As in `bounded`.

    Raises:
        SettingsError: If it is not; it names the bounds.
    """
    bounds = dict(bounds)
    if type(value) is int and _inside(value, bounds) and not {"le", "lt"} & {*bounds}:
        bounds = {"le": _MOST}
    wanted = _describe(name, bounds)
    need(name, value, _inside(value, bounds), wanted)
    if isinstance(value, float):
        need(name, value, math.isfinite(value), f"{wanted} and finite")
        rounded = as_float32(value)
        edges = {test: as_float32(edge) for test, edge in bounds.items()}
        holds = math.isfinite(rounded) and _inside(rounded, edges)
        what = f"{wanted} in float32, in which it is used and is {rounded:.9g}"
        need(name, value, holds, what)


def _inside(value: float | int, bounds: Mapping[str, float | int]) -> bool:
    return all(getattr(operator, test)(value, edge) for test, edge in bounds.items())


def _describe(name: str, bounds: Mapping[str, float | int]) -> str:
    """Returns bounds as text, with the setting's name between two of them."""
    parts = [f"{_SIGNS[test]} {edge}" for test, edge in bounds.items()]
    if len(parts) < 2:
        return parts[0] if parts else "a number"
    sign, edge = parts[0].split()
    return f"{edge} {sign.replace('>', '<')} {name} {parts[1]}"


def as_float32(value: float | int) -> float:
    """Returns what programs in float32 compute with; the smallest numbers are 0."""
    try:
        rounded = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    # XLA takes subnormal numbers for 0.
    return rounded if abs(rounded) >= 2.0**-126 else 0.0


def check_file(name: str, path: str | pathlib.Path) -> None:
    """Raises unless a command can write a file at its end.

    Raises:
        SettingsError: If its folder is missing, or it cannot be written there.
    """
    check_text(name, str(path))
    path = pathlib.Path(path).absolute()
    with parsing(f"{name}: {path}", SettingsError):
        folder = path.parent
        need(name, str(path), folder.is_dir(), "a file in a folder that is there")
        free = path.is_file() or not (path.exists() or path.is_symlink())
        need(name, str(path), free, "a file, not a folder or a device")
        can = os.access(path if path.exists() else folder, os.W_OK)
        need(name, str(path), can, "a file that can be written")


def check_text(name: str, text: str) -> None:
    """Raises unless a text can be a path, or any other setting that is a text.

    Args:
        name: Of the setting.
        text: Given.

    Raises:
        SettingsError: If it is too long, empty, has characters that no name has or
            begins with a `~`, which the shell has not replaced.
    """
    odd = any(unicodedata.category(each) in ("Cc", "Cs") for each in text)
    need(name, text, not odd, "text without control characters and half surrogates")
    path = text.encode()
    fits = len(path) < _MAX_TEXT and max(map(len, path.split(b"/"))) <= _MAX_NAME
    need(name, text, fits, f"a path of names of at most {_MAX_NAME} bytes")
    need(name, text, not text.startswith("~"), "a path written out in place of ~")
    need(name, text, text == text.strip(), "no white space at its ends")
