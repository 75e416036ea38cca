"""All families, and config.json to and from `DecoderConfig` by what they declare."""

import dataclasses
import re
import types
from collections.abc import Mapping
from typing import Any, get_args

from taid_jax.errors import ModelError, parsing, show
from taid_jax.models.config import DecoderConfig
from taid_jax.models.families.family import Buffer, Family, Setting
from taid_jax.models.families.fields import Fields
from taid_jax.models.families.gemma2 import GEMMA2
from taid_jax.models.families.gemma3 import GEMMA3
from taid_jax.models.families.gpt2 import GPT2
from taid_jax.models.families.gpt_neox import GPT_NEOX
from taid_jax.models.families.llama import LLAMA
from taid_jax.models.families.mistral import MISTRAL
from taid_jax.models.families.olmo2 import OLMO2
from taid_jax.models.families.phi3 import PHI3
from taid_jax.models.families.qwen2 import QWEN2
from taid_jax.models.families.qwen3 import QWEN3
from taid_jax.models.families.smollm3 import SMOLLM3
from taid_jax.models.families.stablelm import STABLELM

FAMILIES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    OLMO2,
    SMOLLM3,
    STABLELM,
    GEMMA2,
    GEMMA3,
    PHI3,
    GPT_NEOX,
    GPT2,
)

MOST_LAYERS = 10_000
"""More layers than this are a broken file, not a model."""

_HARMLESS = """
    architectures attention_dropout attention_probs_dropout_prob attn_implementation
    attn_pdrop auto_map bad_words_ids begin_suppress_tokens bos_token bos_token_id
    classifier_dropout cls_token_id decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping embd_pdrop embedding_dropout
    encoder_no_repeat_ngram_size eos_token eos_token_id
    exponential_decay_length_penalty finetuning_task flash_attn forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob
    id2label ignore_index init_device label2id label_smoothing length_penalty
    loss_type mask_token_id max_length max_new_tokens max_seq_len max_seq_length
    max_sequence_length min_length model_max_length model_type name_or_path
    neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores
    pad_token pad_token_id padding_side peft_version prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id seq_length suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class
    tokenizer_model_max_length tokenizer_name tokenizer_padding_side top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version trl_version
    typical_p unk_token unk_token_id unsloth_fixed unsloth_version use_bfloat16
    use_cache use_flash_attention use_flash_attention_2 use_flash_attn
    use_liger_kernel use_sdpa
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Keys of any config.json that change nothing of what a decoder computes: names and
versions, token ids, how to sample, what to return, the labels of classifiers, dropout,
how it was trained or is to be run."""

ONE_WAY: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (),
    "is_causal": (True,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    # Of models that are built like these and multiply here and there.
    **dict.fromkeys(
        ("embedding_multiplier", "logits_scaling", "residual_multiplier"), (1.0, 1)
    ),
    "sparsity_config": ({},),
    "tie_encoder_decoder": (False,),
}
"""Keys of any config.json with the only values that a decoder can follow."""


def supported() -> str:
    """Returns the names of all architectures that can be read, for messages."""
    return ", ".join(f"{family.architecture} ({family.name})" for family in FAMILIES)


def family_named(name: str) -> Family:
    """Returns the family that a `DecoderConfig` names.

    Raises:
        ModelError: If there is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ModelError(f"no family is called {name!r}; there are: {supported()}")


def read_config(
    values: Mapping[str, object], origin: str, *, unknown: list[str] | None = None
) -> DecoderConfig:
    """Returns the architecture that a config.json describes.

    Every key is either read, or known to change nothing, or says nothing (false, zero,
    null, empty), or is refused by its name.

    Args:
        values: The content of config.json.
        origin: Where it comes from, for messages.
        unknown: Takes the keys that would be refused because nobody knows them; they
            are refused when None.

    Raises:
        ModelError: With everything that is wrong.
    """
    family = _family_of(values, origin)
    quantization = values.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "of an unknown kind")
            if isinstance(quantization, Mapping)
            else quantization
        )
        raise ModelError(
            f"{origin} holds quantised weights (quantization_config: {show(method)}), "
            "which are not read; give the original model, or one that was dequantised "
            "and saved in float32, float16 or bfloat16"
        )
    # The numbers of a broken file may be such that none can be computed with.
    with parsing(origin, ModelError):
        fields = Fields(values, origin, unknown=unknown)
        fields.raw("quantization_config")
        got = _read_settings(family, fields)
        for group in family.groups:
            got |= group.read(fields, got)
        for key, allowed in {**ONE_WAY, **family.fixed}.items():
            fields.only(key, allowed)
        fields.finish(HARMLESS | family.harmless)
        try:
            return DecoderConfig(
                family=family.name, vocab_size=got["padded_vocab_size"], **got
            )
        except ModelError as error:
            raise ModelError(f"{origin}: {error}") from error


def write_config(config: DecoderConfig) -> dict[str, object]:
    """Returns the keys of config.json for an architecture, defaults spelled out.

    Raises:
        ModelError: If the architecture is none of its family's.
    """
    family = family_named(config.family)
    values: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": family.name,
    }
    for setting in family.settings:
        if setting.key is not None:
            values[setting.key] = _written(setting, getattr(config, setting.field))
    values |= {key: allowed[0] for key, allowed in family.fixed.items() if allowed}
    for group in family.groups:
        values |= group.write(config)
    origin = f"the config.json of a {family.name}"
    meant, said = _meaning(config), _meaning(read_config(values, origin))
    if lost := [name for name in meant if meant[name] != said[name]]:
        raise ModelError(
            f"{origin} cannot describe this model: "
            + "; ".join(
                f"it means {name} {said[name]!r}, the model has {meant[name]!r}"
                for name in lost
            )
        )
    return values


def _written(setting: Setting, value: object) -> object:
    for word, meant in (setting.words or {}).items():
        if meant == value:
            return word
    return value


def _meaning(config: DecoderConfig) -> dict[str, object]:
    """Returns what the settings say, the same for two ways to say it."""
    values = {name: getattr(config, name) for name in _TYPES}
    # The padding of the vocabulary is a matter of the tokenizer.
    told = ("rope", "local_rope", "rope_layers", "window", "window_layers")
    for name in (*told, "vocab_size"):
        del values[name]
    return values | {"ropes": config.ropes, "windows": config.windows}


def _family_of(values: Mapping[str, object], origin: str) -> Family:
    model_type, named = values.get("model_type"), values.get("architectures")
    # Code that comes with a model never runs; its type has to say what that would be.
    untyped = model_type is None and not values.get("auto_map")
    for family in FAMILIES:
        typed = model_type == family.name
        if named == [family.architecture] and (typed or untyped):
            return family
        if named in (None, []) and typed:
            return family
    raise ModelError(
        f"{origin} has the architectures {show(named)} and the model_type "
        f"{show(model_type)}; need a list with one supported name and the type that "
        f"belongs to it, or one of the two; supported are: {supported()}"
    )


_TYPES = {field.name: field.type for field in dataclasses.fields(DecoderConfig)}


def _read_settings(family: Family, fields: Fields) -> dict[str, Any]:
    got: dict[str, Any] = dict(family.constants)
    for setting in family.settings:
        default = setting.default
        if callable(default):
            # Stand-ins for missing sizes let the reading go on; they are never zero.
            default = default({key: value or 1 for key, value in got.items()})
        got[setting.field] = _read_setting(setting, default, fields)
        if setting.field == "num_layers" and got["num_layers"] > MOST_LAYERS:
            fields.problem(setting.key or "", f"need at most {MOST_LAYERS:,} layers")
            got["num_layers"] = 1
    return got


def _read_setting(setting: Setting, default: Any, fields: Fields) -> object:
    key, words = setting.key, setting.words
    kind: Any = _TYPES[setting.field]
    if key is None:
        return default
    if words is not None:
        kind = type(next(iter(words)))
        word = fields.get(key, default, kind)
        if word not in words:
            can = ", ".join(map(str, words))
            fields.problem(key, f"the decoder can do {can}, not {show(word)}")
        return words.get(word)
    if isinstance(kind, types.UnionType):
        return fields.optional(key, default, get_args(kind)[0])
    return fields.get(key, default, kind)


def buffer_kind(family: Family, tensor: str) -> Buffer | None:
    """Returns what a tensor of a safetensors file repeats, None for a parameter."""
    for pattern, kind in family.buffers.items():
        if re.fullmatch(pattern, tensor):
            return kind
    return None
