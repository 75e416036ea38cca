"""Gemma 2: norms on both sides, soft caps, a window in every other layer."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import ACTIVATIONS, Family, Setting, Weight
from taid_jax.models.families.rope import rope
from taid_jax.models.families.windows import alternating_windows

SETTINGS = (
    *llama.SIZES,
    Setting("head_dim", "head_dim", 256),
    Setting("norm_eps", "rms_norm_eps", 1e-6),
    Setting("tie_embeddings", "tie_word_embeddings", True),
    Setting("attention_bias", "attention_bias", False),
    Setting("query_pre_attn_scalar", "query_pre_attn_scalar", 256),
    Setting("activation", "hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS),
)

# The scale of a norm is one more than its weight; llama.cpp stores the scale.
BOTH_NORMS = tuple(
    Weight(f"layers.{module}", hf, gguf, "d -> d", gguf_offset=1.0)
    for module, hf, gguf in (
        ("attention_norm", "input_layernorm", "attn_norm"),
        ("attention_post_norm", "post_attention_layernorm", "post_attention_norm"),
        ("mlp_norm", "pre_feedforward_layernorm", "ffn_norm"),
        ("mlp_post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
    )
)
FINAL_NORM = Weight(
    "final_norm", "model.norm", "output_norm", "d -> d", gguf_offset=1.0
)

# The first releases name an activation that was never computed.
HARMLESS = frozenset({"hidden_act", "cache_implementation"})
FIXED = {"use_bidirectional_attention": (False,)}

GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    gguf="gemma2",
    settings=(
        *SETTINGS,
        Setting("max_position_embeddings", "max_position_embeddings", 8192),
        Setting("attention_softcap", "attn_logit_softcapping", 50.0),
        Setting("head_softcap", "final_logit_softcapping", 30.0),
    ),
    groups=(
        rope(),
        alternating_windows(window=4096, every=2, every_key=None),
    ),
    constants={
        "norm": "rms_plus_one",
        "norm_place": "both",
        "scale_embedding": True,
    },
    fixed=FIXED,
    harmless=HARMLESS,
    weights=(
        llama.EMBED,
        *BOTH_NORMS,
        *llama.ATTENTION,
        *llama.MLP,
        FINAL_NORM,
        llama.LAST[1],
    ),
    buffers=llama.ROTARY_BUFFERS,
)
