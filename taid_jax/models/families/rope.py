"""Rotary settings in config.json, as transformers 4 and 5 write them."""

import math
from collections.abc import Mapping
from typing import Any

from taid_jax.errors import ModelError, show
from taid_jax.models.config import ROPE_KINDS, DecoderConfig, RopeConfig
from taid_jax.models.families.family import Got, Group
from taid_jax.models.families.fields import REQUIRED, Fields

_ORIGINAL = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"
_KINDS: Mapping[str, str] = dict(zip(ROPE_KINDS, ROPE_KINDS, strict=True))
_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", _ORIGINAL),
    "longrope": (_ORIGINAL, "short_factor", "long_factor", "attention_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}
"""Kind -> keys of a section, which are fields of `RopeConfig` too."""


def rope(
    *,
    theta: float = 10000.0,
    local_theta: float | None = None,
    partial: float | None = None,
    theta_key: str = "rope_theta",
    partial_key: str = _PARTIAL,
    kinds: Mapping[str, str] = _KINDS,
    original: int = 0,
) -> Group:
    """Returns the keys of rotary positions.

    Transformers 5 keeps all of them in `rope_parameters`; transformers 4 has theta
    beside `rope_scaling`, whose kind may be called `type`. Where both are there,
    `rope_scaling` goes first, as `transformers` itself reads them.

    Args:
        theta: What the family takes when the file says nothing.
        local_theta: The same for layers with a window, where these have rotary
            positions of their own; None when all layers share them.
        partial: The same for the part of a head that is rotated; None when the family
            rotates the whole of it.
        theta_key: What transformers 4 calls theta.
        partial_key: What it calls the part of a head.
        kinds: Names of kinds in the file -> kinds of `RopeConfig`.
        original: Original context of the families that have it beside `rope_scaling`.
    """

    def read(fields: Fields, got: Got) -> dict[str, Any]:
        base = {"theta": fields.get(theta_key, theta, float)}
        if partial is None:
            fields.only(_PARTIAL, (1.0,))
        else:
            base[_PARTIAL] = fields.get(partial_key, partial, float)
        outer = fields.get(_ORIGINAL, original, int)
        new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
        found = {"rope": (old or new, base)}
        if local_theta is not None:
            new = new or Fields({}, "")
            own = {"theta": fields.get("rope_local_base_freq", local_theta, float)}
            found = {
                "rope": (old or new.section("full_attention"), base),
                "local_rope": (new.section("sliding_attention"), own),
            }
            new.close("is not a kind of layer", ["full_attention"], named=True)
        length = got["max_position_embeddings"]
        return {
            field: _read(
                fields, section or Fields({}, ""), beside, kinds, length, outer
            )
            for field, (section, beside) in found.items()
        }

    def write(config: DecoderConfig) -> dict[str, object]:
        rope, length = config.rope, config.max_position_embeddings
        if rope is None:
            raise ModelError(f"a {config.family} has rotary positions, this model none")
        old, new = _write(rope, length)
        values: dict[str, object] = {theta_key: rope.theta, "rope_scaling": old}
        if partial is not None:
            values[partial_key] = new[_PARTIAL] = rope.partial_rotary_factor
        if rope.kind == "longrope":
            values[_ORIGINAL] = rope.original_max_position_embeddings
        if local_theta is None:
            return values | {"rope_parameters": new}
        local = config.local_rope or rope
        both = {"full_attention": new, "sliding_attention": _write(local, length)[1]}
        return values | {"rope_local_base_freq": local.theta, "rope_parameters": both}

    return Group(read, write)


def _read(
    fields: Fields,
    section: Fields,
    base: Mapping[str, float],
    kinds: Mapping[str, str],
    length: int,
    outer: int,
) -> RopeConfig:
    """Returns the settings of a section within `fields`; problems are left with both.

    `base` are settings that may stand beside it; `length` is the model's context, and
    `outer` an original context beside the section, which goes first unless it is 0.
    """
    named = section.get("type", "default", str)
    named = section.get("rope_type", named, str)
    if named not in kinds:
        can = ", ".join(kinds)
        section.problem("rope_type", f"the decoder can do {can}, not {show(named)}")
        return RopeConfig()
    kind = kinds[named]
    keys = _KEYS[kind]
    values: dict[str, Any] = {"theta": section.get("rope_theta", base["theta"], float)}
    if _PARTIAL in base:
        values[_PARTIAL] = section.get(_PARTIAL, base[_PARTIAL], float)
    else:
        section.only(_PARTIAL, (1.0,))
    original = length
    if _ORIGINAL in keys:
        original = section.get(_ORIGINAL, length, int)
        original = outer or original
    if kind not in ("default", "linear"):
        values[_ORIGINAL] = original
    for key in keys:
        if key in ("short_factor", "long_factor"):
            if (factors := section.sequence(key, float)) is None:
                section.problem(key, "is missing")
            values[key] = factors or ()
        elif key not in (_ORIGINAL, "attention_factor"):
            standard = REQUIRED
            if kind == "yarn":
                stretched = length / max(1, original)
                standard = stretched if key == "factor" else getattr(RopeConfig, key)
            values[key] = section.get(key, standard, float)
    if kind == "longrope":
        factor = section.get("factor", length / max(1, original), float)
        derived = longrope_attention(factor, original)
        values["attention_factor"] = section.get("attention_factor", derived, float)
    elif kind == "yarn":
        values["attention_factor"] = _yarn_attention(section, values["factor"])
        values["truncate"] = section.get("truncate", True, bool)
        for key in ("beta_fast", "beta_slow"):  # Zero means absent.
            values[key] = values[key] or getattr(RopeConfig, key)
    elif kind == "default":
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
    rope: RopeConfig, length: int
) -> tuple[dict[str, object] | None, dict[str, object]]:
    """Returns `rope_scaling` of transformers 4 and `rope_parameters` of 5."""
    scaling: dict[str, object] = {"rope_type": rope.kind}
    for key in _KEYS[rope.kind]:
        value = getattr(rope, key)
        scaling[key] = list(value) if isinstance(value, tuple) else value
    if rope.kind == "yarn" and not rope.truncate:
        scaling["truncate"] = False
    new = scaling | {"rope_theta": rope.theta}
    if rope.kind == "default":
        return None, new
    if rope.kind != "longrope":
        return scaling, new
    # Transformers 4 wants these three and nothing else, and derives the rest.
    kept = ["short_factor", "long_factor"]
    original = rope.original_max_position_embeddings
    if rope.attention_factor != longrope_attention(length / original, original):
        kept.append("attention_factor")
    return {"type": "longrope"} | {key: scaling[key] for key in kept}, new
