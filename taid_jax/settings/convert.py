"""Settings to and from YAML, JSON and plain values; what a resumed run may change."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from taid_jax.settings.checks import SettingsError
from taid_jax.settings.hosts import HostSettings
from taid_jax.settings.tree import Settings

# Fields that a resumed run may change: they do not touch the numbers it computes.
FREE_ON_RESUME = frozenset(
    {
        "run.output",
        "run.resume",
        "run.eval_every",
        "run.evals_per_epoch",
        "run.save_every",
        "run.log_every",
        "run.keep",
        "run.max_skipped",
        "run.mesh",
        "model.teacher_layout",
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


def _cast(name: str, value: Any, kind: Any) -> Any:
    """Returns `value` as `kind`, or says what was needed."""
    choices = (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType)
        else (kind,)  # a plain type or a Literal
    )
    for choice in choices:
        if choice is type(None):
            if value is None:
                return None
        elif typing.get_origin(choice) is Literal:
            if value in typing.get_args(choice):
                return value
        elif choice is float and isinstance(value, str):
            # YAML 1.1 reads 1e-4, which has no point, as text.
            try:
                return float(value)
            except ValueError:
                continue
        elif choice is float and type(value) in (int, float):
            return float(value)
        elif type(value) is choice:
            return value
    wanted = getattr(kind, "__name__", str(kind).replace("typing.", ""))
    raise SettingsError(f"{name}: need {wanted}, got {value!r}")


Changes = dict[str, dict[str, Any]]
"""New values of some settings, by group and name."""

_STUDENT_SOURCES = ("student", "student_layers", "student_config")


def read_changes(values: Mapping[str, Any]) -> Changes:
    """Returns the values in their groups, each of its setting's type.

    Args:
        values: Groups as in `Settings`, or the fields of any group at the top level.

    Raises:
        SettingsError: On an unknown name or a wrong type.
    """
    groups = {field.name: field.type for field in dataclasses.fields(Settings)}
    kinds = {group: typing.get_type_hints(kind) for group, kind in groups.items()}
    home = {name: group for group, fields in kinds.items() for name in fields}
    changes: Changes = {group: {} for group in groups}

    def put(group: str, name: str, value: Any) -> None:
        changes[group][name] = _cast(name, value, kinds[group][name])

    for key, value in values.items():
        if key in groups and isinstance(value, Mapping):
            for name, inner in value.items():
                if home.get(name) != key:
                    raise SettingsError(f"{key} has no setting {name!r}")
                put(key, name, inner)
        elif key in home:
            put(home[key], key, value)
        else:
            known = ", ".join(sorted([*groups, *home]))
            raise SettingsError(f"no setting is called {key!r}; known are {known}")
    # Another source of the student replaces the one that stood there.
    if any(changes["model"].get(name) is not None for name in _STUDENT_SOURCES):
        changes["model"] = dict.fromkeys(_STUDENT_SOURCES) | changes["model"]
    return changes


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


def from_dict(values: Mapping[str, Any], base: Settings | None = None) -> Settings:
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


def to_yaml(settings: Settings) -> str:
    """Returns the settings as YAML that `read_settings` reads."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False)


def contradictions(saved: Settings, asked: Settings) -> list[str]:
    """Returns what a resumed run may not change, one line per difference."""
    old, new = flatten(saved), flatten(asked)
    free = FREE_ON_RESUME
    if saved.samples.sampler == "adaptive":
        # Its threshold moves with every held-out evaluation.
        free = free - {"run.eval_every", "run.evals_per_epoch"}
    if asked.data.template_date is None:
        # The run goes on with the day when it began.
        free = free | {"data.template_date"}
    return [
        f"{name}: the checkpoint has {old[name]!r}, now {new[name]!r}"
        for name in old
        if name not in free and old[name] != new[name]
    ]
