"""Settings to and from YAML, JSON and plain values; what a resumed run may change."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from taid_jax.errors import show
from taid_jax.settings.checks import SettingsError, cast, need, typed_fields
from taid_jax.settings.hosts import HostSettings
from taid_jax.settings.tree import Settings

# Fields that a resumed run may change: they do not touch the numbers it computes.
FREE_ON_RESUME = frozenset(
    {
        "run.output",
        "run.resume",
        "run.resume_step",
        # Another length is said aloud, and refused where it is behind the checkpoint.
        "run.steps",
        "run.epochs",
        # The checkpoint knows their content, and which files it was read from is free.
        "data.data",
        "model.teacher",
        "run.eval_every",
        "run.evals_per_epoch",
        "run.save_every",
        "run.log_every",
        "run.keep",
        "run.max_skipped",
        "run.mesh",
        "model.teacher_layout",
        "model.allow_unknown_keys",
        "model.export_dtype",
        *(f"hosts.{field.name}" for field in dataclasses.fields(HostSettings)),
    }
)


def to_dict(settings: Settings) -> dict[str, dict[str, Any]]:
    """Returns the settings as nested plain values, for JSON and YAML."""
    return dataclasses.asdict(settings)


def flatten(settings: Settings) -> dict[str, Any]:
    """Returns the settings under dotted names, such as `run.steps`."""
    return {
        f"{group}.{name}": value
        for group, fields in to_dict(settings).items()
        for name, value in fields.items()
    }


def changed(settings: Settings) -> dict[str, Any]:
    """Returns the settings that are not the default, under dotted names."""
    defaults = flatten(Settings())
    return {k: v for k, v in flatten(settings).items() if v != defaults[k]}


Changes = dict[str, dict[str, Any]]
"""New values of some settings, by group and name."""

_FIELDS = {
    group: typed_fields(kind) for group, (kind, _) in typed_fields(Settings).items()
}
_HOME = {name: group for group, fields in _FIELDS.items() for name in fields}
_STUDENT_SOURCES = ("student", "student_layers", "student_config")


def read_changes(values: Mapping[Any, Any]) -> Changes:
    """Returns the values in their groups, each of its setting's type.

    Args:
        values: Groups as in `Settings`, or the fields of any group at the top level.

    Raises:
        SettingsError: On an unknown name or a wrong type.
    """
    changes: Changes = {group: {} for group in _FIELDS}

    def put(group: str, name: str, value: Any) -> None:
        if name in changes[group]:
            raise SettingsError(f"{name} is given twice, in {group} and beside it")
        changes[group][name] = cast(name, value, _FIELDS[group][name][0])

    for key, value in values.items():
        if key in _FIELDS and isinstance(value, Mapping):
            for name, inner in value.items():
                if name not in _FIELDS[key]:
                    raise SettingsError(
                        f"{key} has no setting {show(name)}{_meant(name, _HOME)}"
                    )
                put(key, name, inner)
        elif key in _HOME:
            put(_HOME[key], key, value)
        elif key in _FIELDS:
            need(key, value, False, "names and values")
        else:
            known = [*_HOME, *_FIELDS]
            raise SettingsError(f"no setting is called {show(key)}{_meant(key, known)}")
    # Another source of the student replaces the one that stood there.
    if any(changes["model"].get(name) is not None for name in _STUDENT_SOURCES):
        changes["model"] = dict.fromkeys(_STUDENT_SOURCES) | changes["model"]
    return changes


def _meant(name: object, known: Iterable[str]) -> str:
    """Returns a question after the setting that was meant, if one is like it."""
    close = difflib.get_close_matches(show(name)[:60].strip("'"), known, n=1)
    return f"; was {close[0]} meant?" if close else "; --help lists all settings"


def apply_changes(base: Settings, changes: Changes) -> Settings:
    """Returns the settings with some of them changed.

    Raises:
        SettingsError: If a value is out of range, or contradicts another.
    """
    return Settings(
        **{
            group: dataclasses.replace(getattr(base, group), **fields)
            for group, fields in changes.items()
        }
    )


def from_dict(values: Mapping[Any, Any], base: Settings | None = None) -> Settings:
    """Returns settings with `values` laid over `base`.

    Args:
        values: Groups as in `Settings`, or the fields of any group at the top level.
        base: What is not named stays as here; the defaults when None.

    Raises:
        SettingsError: On an unknown name, a wrong type or a value out of range.
    """
    return apply_changes(base or Settings(), read_changes(values))


def to_json(settings: Settings) -> str:
    """Returns the settings as JSON; `from_dict(json.loads(text))` gives them back."""
    return json.dumps(to_dict(settings), indent=2)


def contradictions(saved: Settings, asked: Settings) -> list[str]:
    """Returns what a resumed run may not change, one line per difference."""
    old, new = flatten(saved), flatten(asked)
    free = FREE_ON_RESUME
    if saved.samples.sampler == "adaptive":
        # Its threshold moves with every held-out evaluation.
        free = free - {"run.eval_every", "run.evals_per_epoch"}
    # Of these it is free which file is named, but not whether one is.
    for name in ("model.student", "model.student_config"):
        if old[name] is not None and new[name] is not None:
            free = free | {name}
    if asked.data.template_date is None:
        # The run goes on with the day when it began.
        free = free | {"data.template_date"}
    return [
        f"{name}: the checkpoint has {show(old[name])}, now {show(new[name])}"
        for name in old
        if name not in free and old[name] != new[name]
    ]
