"""Rotary settings in config.json, as transformers 4 and 5 write them."""

from collections.abc import Mapping
from typing import Any

from taid_jax.models.config import RopeConfig
from taid_jax.models.errors import ModelError
from taid_jax.models.fields import REQUIRED, Fields

DEFAULT_THETA = 10000.0

_KEYS_OF: Mapping[str, Mapping[str, tuple[str, type[int] | type[float]]]] = {
    "default": {},
    "linear": {"factor": ("factor", float)},
    "llama3": {
        "factor": ("factor", float),
        "low_freq_factor": ("low_freq_factor", float),
        "high_freq_factor": ("high_freq_factor", float),
        "original_max_length": ("original_max_position_embeddings", int),
    },
}
"""Kind -> field of RopeConfig -> key in config.json and type."""


def read_rope(fields: Fields) -> RopeConfig:
    """Returns the rotary settings; problems are left with `fields`.

    Transformers 5 keeps all of them in `rope_parameters`; transformers 4 has
    `rope_theta` beside `rope_scaling`, whose kind may be called `type`. Where both are
    there, `rope_scaling` goes first, as `transformers` itself reads them.
    """
    theta = fields.get("rope_theta", DEFAULT_THETA, float)
    fields.only("partial_rotary_factor", (1.0,))
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    chosen = old or new
    if chosen is None:
        return _checked(fields, {"theta": theta})
    kind = chosen.get("type", "default", str)
    kind = chosen.get("rope_type", kind, str)
    if kind not in _KEYS_OF:
        can = ", ".join(_KEYS_OF)
        chosen.problem("rope_type", f"the decoder can do {can}, not {kind!r}")
        return RopeConfig()
    chosen.only("partial_rotary_factor", (1.0,))
    values: dict[str, object] = {
        field: chosen.get(key, REQUIRED, kind_of)
        for field, (key, kind_of) in _KEYS_OF[kind].items()
    }
    values |= {"theta": chosen.get("rope_theta", theta, float), "kind": kind}
    for key in chosen.unread():
        chosen.problem(key, f"is not a setting of {kind!r} rotary positions")
    return _checked(fields, values)


def write_rope(rope: RopeConfig) -> dict[str, object]:
    """Returns the keys of config.json for transformers 4 and 5, side by side."""
    scaling: dict[str, object] = {"rope_type": rope.kind}
    for field, (key, _) in _KEYS_OF[rope.kind].items():
        scaling[key] = getattr(rope, field)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else dict(scaling),
        "rope_parameters": scaling | {"rope_theta": rope.theta},
    }


def _checked(fields: Fields, values: Mapping[str, Any]) -> RopeConfig:
    if fields.problems:  # Stand-ins for what is missing must not be judged.
        return RopeConfig()
    try:
        return RopeConfig(**values)
    except ModelError as error:
        fields.problem("rope_parameters", str(error))
        return RopeConfig()
