"""Rotary settings in config.json, as transformers 4 and 5 write them."""

import math
from collections.abc import Mapping
from typing import Any

from taid_jax.errors import ModelError, show
from taid_jax.models.config import ROPE_KINDS, DecoderConfig, RopeConfig
from taid_jax.models.families.family import Got, Group
from taid_jax.models.families.fields import REQUIRED, Fields

_ORIGINAL = "original_max_position_embeddings"
_FRACTION = "partial_rotary_factor"
_KINDS: Mapping[str, str] = dict(zip(ROPE_KINDS, ROPE_KINDS, strict=True))
_SCALED: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "original_max_length": _ORIGINAL,
    },
    "longrope": {"original_max_length": _ORIGINAL},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_length": _ORIGINAL,
    },
}
"""Kind -> field of RopeConfig -> key in config.json, where they simply correspond."""


def rope(
    *,
    theta: float = 10000.0,
    fraction: float | None = None,
    theta_key: str = "rope_theta",
    fraction_key: str = _FRACTION,
    kinds: Mapping[str, str] = _KINDS,
    original: int | None = None,
) -> Group:
    """Returns the keys of rotary positions that all layers share.

    Transformers 5 keeps all of them in `rope_parameters`; transformers 4 has theta
    beside `rope_scaling`, whose kind may be called `type`. Where both are there,
    `rope_scaling` goes first, as `transformers` itself reads them.

    Args:
        theta: What the family takes when the file says nothing.
        fraction: The same for the part of a head that turns; None when the family
            turns the whole of it.
        theta_key: What transformers 4 calls theta.
        fraction_key: What it calls the fraction.
        kinds: Names of kinds in the file -> kinds of `RopeConfig`.
        original: Original context of the families that have it beside `rope_scaling`.
    """

    def read(fields: Fields, got: Got) -> dict[str, Any]:
        base = {"theta": fields.get(theta_key, theta, float)}
        if fraction is None:
            fields.only(_FRACTION, (1.0,))
        else:
            base["fraction"] = fields.get(fraction_key, fraction, float)
        outer = fields.get(_ORIGINAL, original or 0, int)
        new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
        chosen = old or new or Fields({}, "")
        return {"rope": _read(fields, chosen, base, kinds, got["max_length"], outer)}

    def write(config: DecoderConfig) -> dict[str, object]:
        rope = config.rope
        if rope is None:
            raise ModelError(f"a {config.family} has rotary positions, this model none")
        old, new = _write(rope, config.max_length)
        values: dict[str, object] = {
            theta_key: rope.theta,
            "rope_scaling": old,
            "rope_parameters": new,
        }
        if fraction is not None:
            values[fraction_key] = new[_FRACTION] = rope.fraction
        if rope.kind == "longrope":
            values[_ORIGINAL] = rope.original_max_length
        return values

    return Group(read, write)


def dual_rope(*, theta: float, local_theta: float) -> Group:
    """Returns the keys where layers with a window have rotary positions of their own.

    Args:
        theta: Of layers that see everything, when the file says nothing.
        local_theta: Of layers with a window.
    """

    def read(fields: Fields, got: Got) -> dict[str, Any]:
        thetas = {
            "rope": fields.get("rope_theta", theta, float),
            "local_rope": fields.get("rope_local_base_freq", local_theta, float),
        }
        new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
        new = new or Fields({}, "")
        sections = {
            "rope": old or new.section("full_attention"),
            "local_rope": new.section("sliding_attention"),
        }
        new.close("is not a kind of layer", ["full_attention"], named=True)
        return {
            field: _read(
                fields,
                sections[field] or Fields({}, ""),
                {"theta": thetas[field]},
                _KINDS,
                got["max_length"],
            )
            for field in sections
        }

    def write(config: DecoderConfig) -> dict[str, object]:
        if config.rope is None:
            raise ModelError(f"a {config.family} has rotary positions, this model none")
        local = config.local_rope or config.rope
        old, new = _write(config.rope, config.max_length)
        return {
            "rope_theta": config.rope.theta,
            "rope_local_base_freq": local.theta,
            "rope_scaling": old,
            "rope_parameters": {
                "full_attention": new,
                "sliding_attention": _write(local, config.max_length)[1],
            },
        }

    return Group(read, write)


def _read(
    fields: Fields,
    section: Fields,
    base: Mapping[str, float],
    kinds: Mapping[str, str],
    max_length: int,
    outer: int = 0,
) -> RopeConfig:
    """Returns the settings of a section; problems are left with both.

    Args:
        fields: What the section stands in.
        section: A mapping as `rope_parameters` or `rope_scaling`.
        base: Settings that may stand beside it.
        kinds: Names of kinds -> ours.
        max_length: The model's context.
        outer: Original context beside the section, which goes first; 0 when absent.
    """
    named = section.get("type", "default", str)
    named = section.get("rope_type", named, str)
    if named not in kinds:
        can = ", ".join(kinds)
        section.problem("rope_type", f"the decoder can do {can}, not {show(named)}")
        return RopeConfig()
    kind = kinds[named]
    values: dict[str, Any] = {"theta": section.get("rope_theta", base["theta"], float)}
    if "fraction" in base:
        values["fraction"] = section.get(_FRACTION, base["fraction"], float)
    else:
        section.only(_FRACTION, (1.0,))
    keys = _SCALED[kind]
    if "original_max_length" in keys:
        inner = section.get(_ORIGINAL, max_length, int)
        values["original_max_length"] = outer or inner
    elif kind == "dynamic":
        values["original_max_length"] = max_length
    stretched = max_length / max(1, values.get("original_max_length", max_length))
    if kind == "longrope":
        for field in ("short_factor", "long_factor"):
            factors = section.sequence(field, float)
            if factors is None:
                section.problem(field, "is missing")
            values[f"{field}s"] = factors or ()
        stretched = section.get("factor", stretched, float)
        derived = longrope_attention(stretched, values["original_max_length"])
        values["attention_factor"] = section.get("attention_factor", derived, float)
    elif kind == "yarn":
        factor = section.get("factor", stretched, float)
        values["factor"] = factor
        values["attention_factor"] = _yarn_attention(section, factor)
        for field in ("beta_fast", "beta_slow"):
            standard = getattr(RopeConfig, field)
            values[field] = section.get(field, standard, float) or standard
        values["truncate"] = section.get("truncate", True, bool)
    else:
        for field, key in keys.items():
            if field not in values:
                values[field] = section.get(key, REQUIRED, float)
    if kind == "default":
        section.only("factor", (1.0, 1))
    # What the scaling was made by, which no number depends on.
    section.close(f"is not a setting of {kind!r} rotary positions", ["finetuned"])
    if section.problems:  # Stand-ins for what is missing must not be judged.
        return RopeConfig()
    try:
        return RopeConfig(kind=kind, **values)
    except ModelError as error:
        fields.problem("rope_parameters", str(error))
        return RopeConfig()


def longrope_attention(factor: float, original: int) -> float:
    """Returns what multiplies cosine and sine, as transformers derives it."""
    if factor <= 1 or original <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn_attention(section: Fields, factor: float) -> float:
    """Returns the same; from two further numbers (DeepSeek's) where they are given."""

    def derived(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    over, under = (section.get(key, 0.0, float) for key in ("mscale", "mscale_all_dim"))
    standard = derived(1.0)
    if over and under:
        if divisor := derived(under):
            standard = derived(over) / divisor
        else:
            section.problem("mscale_all_dim", f"{under} asks for a division by zero")
    return section.get("attention_factor", standard, float)


def _write(
    rope: RopeConfig, max_length: int
) -> tuple[dict[str, object] | None, dict[str, object]]:
    """Returns `rope_scaling` of transformers 4 and `rope_parameters` of 5."""
    scaling: dict[str, object] = {"rope_type": rope.kind}
    for field, key in _SCALED[rope.kind].items():
        scaling[key] = getattr(rope, field)
    if rope.kind == "yarn" and not rope.truncate:
        scaling["truncate"] = False
    if rope.kind != "longrope":
        old = None if rope.kind == "default" else dict(scaling)
        return old, scaling | {"rope_theta": rope.theta}
    factors = {
        "short_factor": list(rope.short_factors),
        "long_factor": list(rope.long_factors),
    }
    # Transformers 4 wants these three and nothing else, and derives the rest.
    old = {"type": "longrope", **factors}
    stretched = max_length / rope.original_max_length
    if rope.attention_factor != longrope_attention(stretched, rope.original_max_length):
        old["attention_factor"] = rope.attention_factor
    new = scaling | factors | {"attention_factor": rope.attention_factor}
    return old, new | {"rope_theta": rope.theta}
