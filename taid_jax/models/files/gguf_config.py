"""The metadata of a GGUF file, told in the words of config.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from taid_jax.errors import ModelError, parsing, show
from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.families import FAMILIES, MOST_LAYERS, Family, read_config
from taid_jax.models.families.fields import REQUIRED, Fields
from taid_jax.models.families.rope import longrope_attention
from taid_jax.models.files.gguf import GgufFile
from taid_jax.models.rope import rope_frequencies

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_ROPE_FACTORS = "rope_freqs.weight"
_LONG_ROPE = ("rope_factors_short.weight", "rope_factors_long.weight")

_ONE_WAY: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
}
"""Keys of an architecture with the only values that the decoder can follow."""

_HARMLESS = ("rope.scaling.finetuned", "tensor_data_layout")

_YARN: Mapping[str, tuple[float, ...]] = {
    "yarn_ext_factor": (1.0, -1.0),  # Below zero it is chosen by the kind of scaling.
    "yarn_attn_factor": (1.0,),
    "yarn_log_multiplier": (0.0,),
}
"""Keys of `rope.scaling` with the only values that the decoder can follow."""

_OPTIONAL: Mapping[str, tuple[str, type[int] | type[float], tuple[str, ...]]] = {
    "attention.sliding_window": (
        "sliding_window",
        int,
        ("gemma2", "gemma3", "phi3"),
    ),
    "attn_logit_softcapping": ("attn_logit_softcapping", float, ("gemma2",)),
    "final_logit_softcapping": (
        "final_logit_softcapping",
        float,
        ("gemma2", "gemma3"),
    ),
    "rope.freq_base_swa": ("rope_local_base_freq", float, ("gemma3",)),
}
"""Key of an architecture -> key in config.json, its type, who may have it."""

_LARGEST_GEMMA: Mapping[str, int] = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, which alone divide scores by the root of another number
than the width of a head. The file does not say so; llama.cpp goes by the layers too."""


def read_gguf_config(file: GgufFile, unknown: list[str] | None = None) -> DecoderConfig:
    """Returns the architecture that a GGUF file describes.

    What the metadata say is put in the words of config.json and read as such, so that
    the family's own file decides what it means. `unknown` is as in `read_config`.

    Raises:
        ModelError: With everything that is wrong or that the decoder cannot do.
    """
    family = _family_of(file)
    with parsing(file.origin, ModelError):
        values = _in_words_of_json(file, family, unknown)
    return read_config(values, file.origin)


def _in_words_of_json(
    file: GgufFile, family: Family, unknown: list[str] | None
) -> dict[str, Any]:
    prefix = f"{family.gguf}."
    metadata = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    fields = Fields(metadata, file.origin, prefix, unknown)
    values = _read_sizes(file, fields)
    values |= _read_attention(family, fields, values)
    rope = _read_rope(file, family, fields, values)
    for key, allowed in _ONE_WAY.items():
        fields.only(key, allowed)
    fields.finish(_HARMLESS)
    values |= rope | _read_tensors(file, family)
    return values | {"architectures": [family.architecture], "model_type": family.name}


def _family_of(file: GgufFile) -> Family:
    architecture = file.metadata.get("general.architecture")
    for family in FAMILIES:
        if family.gguf is not None and family.gguf == architecture:
            return family
    names = ", ".join(family.gguf for family in FAMILIES if family.gguf)
    raise ModelError(
        f"{file.path} has the architecture {show(architecture)}, which is not "
        f"supported in GGUF files; supported are: {names}"
    )


def _read_sizes(file: GgufFile, fields: Fields) -> dict[str, Any]:
    d_model = fields.get("embedding_length", REQUIRED, int)
    num_layers = fields.get("block_count", REQUIRED, int)
    num_heads = fields.get("attention.head_count", REQUIRED, int)
    shapes = file.shapes
    rows = shapes[_EMBEDDING][0] if _EMBEDDING in shapes else 1
    if num_layers > MOST_LAYERS:
        fields.problem("block_count", f"need at most {MOST_LAYERS:,} layers")
    norm_eps = fields.get("attention.layer_norm_rms_epsilon", REQUIRED, float)
    return {
        "hidden_size": d_model,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.get("attention.head_count_kv", num_heads, int),
        "head_dim": fields.get(
            "attention.key_length", d_model // max(1, num_heads), int
        ),
        "intermediate_size": fields.get("feed_forward_length", REQUIRED, int),
        "max_position_embeddings": fields.get("context_length", REQUIRED, int),
        "rms_norm_eps": _shortest(norm_eps),
        "vocab_size": fields.get("vocab_size", rows, int),
    }


def _read_attention(
    family: Family, fields: Fields, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    fields.only("attention.value_length", (sizes["head_dim"],))
    found: dict[str, Any] = {}
    for key, (name, kind, families) in _OPTIONAL.items():
        if family.gguf not in families:
            fields.only(key, (0,))
        elif value := fields.get(key, 0, kind):  # 0 says that there is none.
            found[name] = value if kind is int else _shortest(value)
    if "query_pre_attn_scalar" in _keys(family):
        heads = max(1, sizes["num_attention_heads"])
        largest = sizes["num_hidden_layers"] == _LARGEST_GEMMA[family.gguf or ""]
        found["query_pre_attn_scalar"] = (
            sizes["hidden_size"] // heads if largest else sizes["head_dim"]
        )
    pattern = "attention.sliding_window_pattern"
    if isinstance(fields.raw(pattern), list):
        kinds = {True: "sliding_attention", False: "full_attention"}
        listed = fields.sequence(pattern, bool) or ()
        found["layer_types"] = [kinds[windowed] for windowed in listed]
    elif pattern in fields:
        found["sliding_window_pattern"] = fields.get(pattern, 1, int)
    return found


def _read_rope(
    file: GgufFile, family: Family, fields: Fields, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the rotary settings; the factors of each frequency are tensors."""
    head_dim = sizes["head_dim"]
    turned = fields.get("rope.dimension_count", head_dim, int)
    theta = _shortest(fields.get("rope.freq_base", 10000.0, float))
    kind = fields.get("rope.scaling.type", "", str)
    factor = fields.get("rope.scaling.factor", 1.0, float)
    factor = _shortest(fields.get("rope.scale_linear", factor, float))
    original = fields.get("rope.scaling.original_context_length", 0, int)
    attention = _shortest(fields.get("rope.scaling.attn_factor", 1.0, float))
    betas = {
        f"beta_{end}": fields.get(f"rope.scaling.yarn_beta_{end}", standard, float)
        for end, standard in (("fast", 32.0), ("slow", 1.0))
    }
    for key, allowed in _YARN.items():
        # Where nothing is scaled by YaRN, zero says so.
        fields.only(
            f"rope.scaling.{key}", allowed if kind == "yarn" else (*allowed, 0.0)
        )
    given = [name for name in (_ROPE_FACTORS, *_LONG_ROPE) if name in file.shapes]
    long = given == list(_LONG_ROPE)
    scaled = factor != 1 or kind not in ("", "none", "longrope")
    if given and not long and given != [_ROPE_FACTORS]:
        fields.problem("rope", f"{' and '.join(given)} do not go together")
    elif (long and scaled) or (kind == "none" and factor != 1):
        fields.problem(
            "rope.scaling", f"{kind!r} by {factor} contradicts {given or kind}"
        )
    if turned != head_dim and family.gguf != "phi3":
        fields.only("rope.dimension_count", (head_dim,))
    if kind not in ("", "none", "linear", "yarn", "longrope"):
        fields.problem(
            "rope.scaling.type",
            f"the decoder can do linear, yarn and longrope, not {show(kind)}",
        )
    if kind == "longrope" and not long:
        fields.problem(
            "rope.scaling.type", f"'longrope' needs {' and '.join(_LONG_ROPE)}"
        )
    if attention != 1 and not long:
        fields.only("rope.scaling.attn_factor", (1.0,))
    if fields.problems:
        return {}
    found: dict[str, Any] = {"rope_theta": theta}
    llama3 = None
    if _ROPE_FACTORS in given:
        llama3 = _llama3_scaling(file, _factors(file, _ROPE_FACTORS, turned), theta)
        if llama3 is not None and scaled:
            raise ModelError(
                f"{file.path}: {_ROPE_FACTORS} scales the rotary positions, and so "
                f"does rope.scaling ({show(kind)} by {factor}); the decoder does one"
            )
    if turned != head_dim:
        found["partial_rotary_factor"] = turned / max(1, head_dim)
    if long:
        short, extended = (_factors(file, name, turned) for name in _LONG_ROPE)
        found["original_max_position_embeddings"] = original or None
        scaling = {
            "rope_type": "longrope",
            "short_factor": short.tolist(),
            "long_factor": extended.tolist(),
        }
        stretched = sizes["max_position_embeddings"] / max(1, original)
        derived = longrope_attention(stretched, original)
        # The file rounds to float32 what config.json leaves to be derived.
        if attention != _shortest(derived):
            scaling["attention_factor"] = attention
        found["rope_scaling"] = scaling
    elif llama3 is not None:
        found["rope_scaling"] = llama3
    elif kind == "yarn":
        found["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original or None,
            **{key: _shortest(value) for key, value in betas.items()},
        }
    elif factor != 1:
        found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return found


def _factors(file: GgufFile, name: str, turned: int) -> np.ndarray:
    shape = file.shapes[name]
    if shape != (turned // 2,):
        raise ModelError(
            f"{file.path}: {name} has shape {shape}, the metadata need ({turned // 2},)"
        )
    return file.read(name, (slice(0, shape[0]),))


def _llama3_scaling(
    file: GgufFile, factors: np.ndarray, theta: float
) -> dict[str, Any] | None:
    """Returns the settings whose frequencies were divided by these factors.

    llama.cpp keeps Llama 3's scaling as the finished factors; all published models have
    the same three of its four settings, and the fourth is the largest factor.
    """
    if np.all(factors == 1.0):
        return None
    factor = max(1.0, float(np.nan_to_num(factors).max()))
    rope = RopeConfig(theta=theta, kind="llama3", factor=factor)
    plain, scaled = (
        rope_frequencies(each, 2 * factors.size)
        for each in (RopeConfig(theta=theta), rope)
    )
    # Both are rounded to float32; a factor that is no number is near nothing.
    if not np.allclose(factors, plain / scaled, rtol=1e-5):
        raise ModelError(
            f"{file.path}: {_ROPE_FACTORS} holds rotary factors that are not "
            "those of Llama 3; the decoder cannot follow them"
        )
    return {
        "rope_type": rope.kind,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }


def _read_tensors(file: GgufFile, family: Family) -> dict[str, Any]:
    """Returns the settings that show in which tensors there are."""
    shapes, known = file.shapes, _keys(family)
    shown = {
        "tie_word_embeddings": _HEAD not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }
    return {key: value for key, value in shown.items() if key in known}


def _keys(family: Family) -> set[str | None]:
    return {setting.key for setting in family.settings}


def _shortest(value: float) -> float:
    """Returns the number that was meant by a float32: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))
