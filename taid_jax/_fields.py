"""Fields of settings: what each declares of itself, and the one check of it."""

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


class SettingsError(InputError):
    """A setting is out of range, unknown, without effect, or contradicts another."""


def setting(
    default: Any,
    *,
    when: Mapping[str, Any] | None = None,
    instead_of: tuple[str, ...] = (),
    replaces: tuple[str, ...] = (),
    free: bool = False,
    prose: bool = False,
    **bounds: float | int,
) -> Any:
    """Returns a dataclass field for a group of settings.

    Args:
        default: Of the field.
        when: What others of the group have to be, or it has no effect: by name the
            values that give it one, or bounds.
        instead_of: Others that say the same in another way, and cannot stand beside it.
        replaces: Others that lose what a file says of them when this one is given
            without them, and the reverse; beside those of `instead_of`.
        free: Whether a resumed run may change it, as it does not touch the numbers that
            the run computes, or the checkpoint knows better.
        prose: Whether it is a text of any length and several lines, and no name.
        **bounds: `ge` or `gt`, then `le` or `lt`, as in the module `operator`.
    """
    metadata = {
        "when": when or {},
        "instead_of": instead_of,
        "replaces": (*instead_of, *replaces),
        "free": free,
        "prose": prose,
        "bounds": bounds,
    }
    return dataclasses.field(default=default, metadata=metadata)


class Checked:
    """A frozen dataclass whose fields are checked when it is made."""

    def __post_init__(self):
        for name, (kind, field) in typed_fields(type(self)).items():
            value = cast(name, getattr(self, name), kind)
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, str):
                    filled = each != "" or field.default == ""
                    need(name, each, filled, "a text that is not empty")
                    check = check_prose if field.metadata.get("prose") else check_text
                    check(name, each)
                elif type(each) in (int, float):
                    check_number(name, each, field.metadata.get("bounds", {}))
            object.__setattr__(self, name, value)  # An int became the float it means.
        for reason in without_effect(typed_fields(type(self)), vars(self)).values():
            raise SettingsError(reason)

    def _need(self, name: str, holds: bool, what: str) -> None:
        """Raises unless a field of this group holds; see `need`."""
        need(name, getattr(self, name), holds, what)


def typed_fields(group: type) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Returns type and declaration of each field of a dataclass."""
    hints = _hints(group)
    fields = dataclasses.fields(typing.cast(Any, group))
    return {field.name: (hints[field.name], field) for field in fields}


_hints = functools.cache(typing.get_type_hints)


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


def check_number(
    name: str, value: float | int, bounds: Mapping[str, float | int]
) -> None:
    """Raises unless a number, as it is and in float32, is finite and within bounds.

    Args:
        name: Of the setting.
        value: Given; integers end at 2**31 where `bounds` have no other end, as the
            programs count in int32.
        bounds: As in `setting`.

    Raises:
        SettingsError: If it is not; it names the bounds.
    """
    bounds = dict(bounds)
    if type(value) is int and _inside(value, bounds) and not {"le", "lt"} & {*bounds}:
        bounds = {"le": 2**31 - 1}
    wanted = _describe(name, bounds)
    need(name, value, _inside(value, bounds), wanted)
    if isinstance(value, float):
        need(name, value, math.isfinite(value), f"{wanted} and finite")
        rounded = _as_float32(value)
        edges = {test: _as_float32(edge) for test, edge in bounds.items()}
        holds = math.isfinite(rounded) and _inside(rounded, edges)
        what = f"{wanted} in float32, in which it is used and is {rounded:.9g}"
        need(name, value, holds, what)


def check_text(name: str, text: str) -> None:
    """Raises unless a text can be a path, or any other setting that is a text.

    Raises:
        SettingsError: If it is too long, has characters that no name has or begins
            with a `~`, which the shell has not replaced.
    """
    odd = any(unicodedata.category(each) in ("Cc", "Cs") for each in text)
    need(name, text, not odd, "text without control characters and half surrogates")
    path = text.encode()  # File systems take 4,096 bytes, and 255 of each name.
    fits = len(path) < 4096 and max(map(len, path.split(b"/"))) <= 255
    need(name, text, fits, "a path of names of at most 255 bytes")
    need(name, text, not text.startswith("~"), "a path written out in place of ~")
    need(name, text, text == text.strip(), "no white space at its ends")


def check_prose(name: str, text: str) -> None:
    """Raises unless a text has characters alone that are written: lines and tabs too.

    Raises:
        SettingsError: If it has others.
    """
    kinds = {unicodedata.category(each) for each in text if each not in "\n\t"}
    what = "text without control characters and half surrogates"
    need(name, text, not kinds & {"Cc", "Cs"}, what)


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


def cast(name: str, value: Any, kind: Any) -> Any:
    """Returns a value as a setting's type; an int will do for a float.

    A list becomes a tuple, which is what a setting of several values is; a list of one
    becomes that one where a single value will do.
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
        if typing.get_origin(choice) is tuple:
            each = typing.get_args(choice)[0]
            if isinstance(value, list | tuple):
                if len(value) == 1 and each in choices:
                    return cast(name, value[0], each)
                return tuple(cast(name, one, each) for one in value)
            wanted.append(f"a list of {each.__name__}")
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


def _inside(value: Any, bounds: Mapping[str, Any]) -> bool:
    return all(getattr(operator, test)(value, edge) for test, edge in bounds.items())


def _describe(name: str, bounds: Mapping[str, Any]) -> str:
    """Returns bounds as text, with the setting's name between two of them."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "ne": "other than"}
    parts = [f"{signs[test]} {edge}" for test, edge in bounds.items()]
    if len(parts) < 2:
        return parts[0] if parts else "a number"
    sign, edge = parts[0].split()
    return f"{edge} {sign.replace('>', '<')} {name} {parts[1]}"


def _as_float32(value: float | int) -> float:
    """Returns what programs in float32 compute with; the smallest numbers are 0."""
    try:
        rounded = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    # XLA takes subnormal numbers for 0.
    return rounded if abs(rounded) >= 2.0**-126 else 0.0


def without_effect(
    fields: Mapping[str, tuple[Any, dataclasses.Field[Any]]], values: Mapping[str, Any]
) -> dict[str, str]:
    """Returns why each setting that has no effect has none, by name."""
    found = {}
    for name, (_, field) in fields.items():
        if values[name] == field.default:
            continue
        for other, wanted in field.metadata.get("when", {}).items():
            value = values[other]
            if isinstance(wanted, Mapping):
                holds, text = _inside(value, wanted), _describe(other, wanted)
            else:
                holds, text = value in wanted, " or ".join(map(str, wanted))
            if not holds:
                found[name] = (
                    f"{name}: has no effect with {other} {value}: it needs {other} "
                    f"{text}, or its default, {show(field.default)}, "
                    f"got {show(values[name])}"
                )
        for other in field.metadata.get("instead_of", ()):
            if values[other] != fields[other][1].default:
                found[name] = f"{name}: need no {other} beside it, got both"
    return found
