"""Llama 1 to 3 and what is built like it (TinyLlama, SmolLM2, ...); its names for all.

Settings and tensors that other families share with Llama stand here by themselves.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from taid_jax.models.families.family import (
    ACTIVATIONS,
    Buffer,
    Family,
    Got,
    Group,
    Setting,
    Weight,
)
from taid_jax.models.families.fields import REQUIRED
from taid_jax.models.families.rope import rope

EMBED = Weight("embed", "model.embed_tokens", "token_embd", "v d -> v d")

NORMS = (
    Weight("layers.attention_norm", "input_layernorm", "attn_norm", "d -> d"),
    Weight("layers.mlp_norm", "post_attention_layernorm", "ffn_norm", "d -> d"),
)

ATTENTION = (
    Weight("layers.attention.q_proj", "self_attn.q_proj", "attn_q", "(n h) d -> d n h"),
    Weight("layers.attention.k_proj", "self_attn.k_proj", "attn_k", "(k h) d -> d k h"),
    Weight("layers.attention.v_proj", "self_attn.v_proj", "attn_v", "(k h) d -> d k h"),
    Weight(
        "layers.attention.o_proj", "self_attn.o_proj", "attn_output", "d (n h) -> n h d"
    ),
)

HEAD_NORMS = (
    Weight("layers.attention.q_norm", "self_attn.q_norm", "attn_q_norm", "h -> h"),
    Weight("layers.attention.k_norm", "self_attn.k_norm", "attn_k_norm", "h -> h"),
)

MLP = (
    Weight("layers.mlp.gate_proj", "mlp.gate_proj", "ffn_gate", "f d -> d f"),
    Weight("layers.mlp.up_proj", "mlp.up_proj", "ffn_up", "f d -> d f"),
    Weight("layers.mlp.down_proj", "mlp.down_proj", "ffn_down", "d f -> f d"),
)

LAST = (
    Weight("final_norm", "model.norm", "output_norm", "d -> d"),
    Weight("lm_head", "lm_head", "output", "v d -> d v"),
)

ROTARY_BUFFERS: Mapping[str, Buffer] = {
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq": (
        "rope_frequencies"
    )
}
"""Some checkpoints carry them though they follow from the config."""

BODY = (EMBED, *NORMS, *ATTENTION, *MLP)


def head_dim(got: Got) -> int:
    """Returns the width of a head where the model's is shared out evenly."""
    return got["d_model"] // got["num_heads"]


def like_llama(
    name: str,
    architecture: str,
    *settings: Setting,
    max_position_embeddings: int,
    norm_eps: float = 1e-6,
    tie_embeddings: bool = False,
    groups: tuple[Group, ...] = (rope(),),
    weights: tuple[Weight, ...] = (*BODY, *LAST),
    **options: Any,
) -> Family:
    """Returns a family whose config.json has the keys of Llama.

    `settings` come beside these keys, or take the place of that of the same field.
    Context, `norm_eps` and `tie_embeddings` are what `transformers` takes where the
    file says nothing; the rest is as in `Family`.
    """
    usual = (
        Setting("padded_vocab_size", "vocab_size", REQUIRED),
        Setting("d_model", "hidden_size", REQUIRED),
        Setting("mlp_dim", "intermediate_size", REQUIRED),
        Setting("num_layers", "num_hidden_layers", REQUIRED),
        Setting("num_heads", "num_attention_heads", REQUIRED),
        Setting("initializer_range", "initializer_range", 0.02),
        Setting("num_kv_heads", "num_key_value_heads", REQUIRED),
        Setting("head_dim", "head_dim", head_dim),
        Setting(
            "max_position_embeddings",
            "max_position_embeddings",
            max_position_embeddings,
        ),
        Setting("norm_eps", "rms_norm_eps", norm_eps),
        Setting("tie_embeddings", "tie_word_embeddings", tie_embeddings),
        Setting("activation", "hidden_act", "silu", ACTIVATIONS),
    )
    by_field = {setting.field: setting for setting in (*usual, *settings)}
    return Family(
        name=name,
        architecture=architecture,
        settings=tuple(by_field.values()),
        groups=groups,
        weights=weights,
        **{"buffers": ROTARY_BUFFERS, **options},
    )


ATTENTION_BIAS = Setting("attention_bias", "attention_bias", False)
MLP_BIAS = Setting("mlp_bias", "mlp_bias", False)

# llama.cpp keeps the two halves (c) of each rotary pair side by side; Hugging Face has
# the first halves of all pairs (r) of a head before the second ones.
_QUERIES, _KEYS = (
    dataclasses.replace(weight, gguf_layout=layout)
    for weight, layout in zip(
        ATTENTION, ("(n r c) d -> d n (c r)", "(k r c) d -> d k (c r)"), strict=False
    )
)

LLAMA = like_llama(
    "llama",
    "LlamaForCausalLM",
    Setting("num_kv_heads", "num_key_value_heads", lambda got: got["num_heads"]),
    Setting("activation", "hidden_act", "silu", {"silu": "silu", "swish": "silu"}),
    ATTENTION_BIAS,
    MLP_BIAS,
    max_position_embeddings=2048,
    gguf="llama",
    harmless=frozenset({"is_llama_config"}),
    weights=(EMBED, *NORMS, _QUERIES, _KEYS, *ATTENTION[2:], *MLP, *LAST),
    gguf_settings=frozenset({"rope_freqs.weight"}),
)
