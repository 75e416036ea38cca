"""Reading the settings of an untrusted file: typed, bounded, nothing overlooked."""

import collections
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeVar

from taid_jax.errors import ModelError, parsing, shorten, show

LARGEST = 2**31 - 1
"""No size of a model comes near it; what lies above is a broken file."""

_LARGEST_FLOAT = 1e30
_MOST_BYTES = 64 << 20
_MOST_PROBLEMS = 20
_T = TypeVar("_T", bool, int, float, str)


PASS_OVER = "--allow-unknown-keys loads the model in spite of that"
"""What a message about something unknown ends with."""


class Required:
    """The default of a setting that has to be there."""


REQUIRED: Final = Required()


class Fields:
    """A mapping whose entries are taken out one by one; problems are collected.

    A problem never stops the reading: the caller asks for everything it needs, then
    calls `finish`, which raises one error with all that is wrong. Null means absent.

    Args:
        values: Keys and values as they were read.
        origin: Where they come from, for messages.
        prefix: Put before the keys in messages.
        unknown: Takes the keys that nobody asked for, which are problems when None.
    """

    def __init__(
        self,
        values: Mapping[str, object],
        origin: str,
        prefix: str = "",
        unknown: list[str] | None = None,
    ):
        self._values = dict(values)
        self._origin = origin
        self._prefix = prefix
        self._unknown = unknown
        self._seen: set[str] = set()
        self._sections: list[Fields] = []
        self._own_problems: list[str] = []

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    @property
    def problems(self) -> list[str]:
        """What was wrong so far, sections included."""
        inner = [text for section in self._sections for text in section.problems]
        return self._own_problems + inner

    def problem(self, key: str, what: str) -> None:
        """Notes that the entry at `key` cannot be used."""
        self._own_problems.append(f"{shown_name(self._prefix + key)}: {what}")

    def raw(self, key: str) -> object:
        """Returns the entry as it is, None when absent, and counts it as read."""
        self._seen.add(key)
        return self._values.get(key)

    def get(self, key: str, default: _T | Required, kind: type[_T]) -> _T:
        """Returns the entry, of the type asked for, or the default when absent."""
        value = self.raw(key)
        if value is None:
            if not isinstance(default, Required):
                return default
            self.problem(key, "is missing")
        elif _fits(value, kind):
            return kind(value)  # type: ignore[arg-type]
        else:
            wanted = _WANTED[kind]
            self.problem(key, f"need {wanted}, got {_shown(value)}")
        # Anything that lets the reading go on; `finish` raises before it is used.
        return kind(1)

    def optional(self, key: str, default: _T | None, kind: type[_T]) -> _T | None:
        """Returns the entry, None where it is null, or the default when absent."""
        if key in self:
            return self.get(key, REQUIRED, kind)
        self._seen.add(key)
        return None if key in self._values else default

    def sequence(self, key: str, kind: type[_T]) -> tuple[_T, ...] | None:
        """Returns the entries of a list, all of one type; None when absent."""
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, list) and all(_fits(entry, kind) for entry in value):
            return tuple(kind(entry) for entry in value)  # type: ignore[arg-type]
        self.problem(key, f"need a list, each {_WANTED[kind]}, got {_shown(value)}")
        return None

    def section(self, key: str) -> "Fields | None":
        """Returns the mapping at `key`, read in the same way; None when absent."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.problem(key, f"need a mapping, got {_shown(value)}")
            value = {}
        prefix = f"{self._prefix}{key}."
        inner = Fields(value, self._origin, prefix, self._unknown)
        self._sections.append(inner)
        return inner

    def only(self, key: str, allowed: Sequence[object]) -> None:
        """Notes a problem unless the entry is absent or one of those allowed."""
        value = self.raw(key)
        if value is not None and not any(_same(value, other) for other in allowed):
            can = " or ".join(map(repr, allowed)) or "nothing here"
            self.problem(key, f"the decoder can do {can}, not {_shown(value)}")

    def close(
        self, what: str, harmless: Iterable[str] = (), *, named: bool = False
    ) -> None:
        """Notes every key that says something and that nobody asked for.

        False, zero, null and what is empty say nothing: they switch off what is not
        there. Nor do keys that begin with an underscore.

        Args:
            what: Is said of such a key.
            harmless: Keys that may be there.
            named: A key says something by its name; only null says nothing then.
        """
        known = self._seen.union(harmless)
        for key, value in self._values.items():
            silent = value is None if named else not value
            if key in known or silent or key.startswith("_"):
                continue
            if self._unknown is None:
                self.problem(key, f"{what}; {PASS_OVER}")
            else:
                self._unknown.append(shown_name(self._prefix + key))

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Raises if something was wrong, or was not read and is not harmless.

        Raises:
            ModelError: With everything that is wrong.
        """
        self.close("is not a setting that the decoder knows", harmless)
        if self.problems:
            count, shown = len(self.problems), self.problems[:_MOST_PROBLEMS]
            shown += [f"and {count - len(shown)} more"] * (count > len(shown))
            raise ModelError(
                f"{self._origin} asks for what cannot be done: " + "; ".join(shown)
            )


def shown_name(name: str) -> str:
    """Returns a name out of a file as a message may have it: short and printable."""
    return shorten(name if name.isprintable() else show(name), 100)


def require_file(path: pathlib.Path) -> None:
    """Raises if there is something else than a file.

    Opening a pipe would wait for its other end, and some devices never end.

    Raises:
        ModelError: If that is so; not if there is nothing.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ModelError(f"{path} is no file, or a link to nothing")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ModelError: If there is none that can be read.
    """
    with parsing(f"{path} cannot be read", ModelError):
        require_file(path)
        if path.stat().st_size > _MOST_BYTES:
            raise ModelError(f"{path} is too large to be a JSON file of a model")
        content = path.read_bytes()
    with parsing(f"{path} is not JSON", ModelError):
        values = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
        )
    if not isinstance(values, dict):
        raise ModelError(f"{path} has to hold a JSON object, got {_shown(values)}")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(twice, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {show(twice)} twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it has the number {name}")


_WANTED: Mapping[type, str] = {
    bool: "true or false",
    int: f"an integer from 0 to {LARGEST:,}",
    float: f"a number up to {_LARGEST_FLOAT:g}",
    str: "a text",
}


def _fits(value: object, kind: type) -> bool:
    if isinstance(value, bool) or kind in (bool, str):
        return isinstance(value, kind) and (kind is bool) == isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and 0 <= value <= LARGEST
    # False for NaN too; an integer may be too large to become a float at all.
    return isinstance(value, int | float) and abs(value) <= _LARGEST_FLOAT


def _same(value: object, other: object) -> bool:
    # 1 == True and 0 == False in Python, which no config means.
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _shown(value: object) -> str:
    return shorten(show(value), 80)
