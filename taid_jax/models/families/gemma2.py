"""Gemma 2: norms on both sides, soft caps, a window in every other layer."""

import dataclasses

from taid_jax.models.families import llama
from taid_jax.models.families.family import ACTIVATIONS, Setting, Weight
from taid_jax.models.families.rope import rope
from taid_jax.models.families.windows import alternating_windows

SETTINGS = (
    Setting("head_dim", "head_dim", 256),
    llama.ATTENTION_BIAS,
    Setting("query_pre_attn_scalar", "query_pre_attn_scalar", 256),
    Setting("activation", "hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS),
)
CONSTANTS = {"norm": "rms_plus_one", "norm_place": "both", "scale_embedding": True}

# The scale of a norm is one more than its weight; llama.cpp stores the scale.
_NORMS = tuple(
    Weight(f"layers.{module}", hf, gguf, "d -> d", gguf_offset=1.0)
    for module, hf, gguf in (
        ("attention_norm", "input_layernorm", "attn_norm"),
        ("attention_post_norm", "post_attention_layernorm", "post_attention_norm"),
        ("mlp_norm", "pre_feedforward_layernorm", "ffn_norm"),
        ("mlp_post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
    )
)
BODY = (llama.EMBED, *_NORMS, *llama.ATTENTION, *llama.MLP)
LAST = (dataclasses.replace(llama.LAST[0], gguf_offset=1.0), llama.LAST[1])

# The first releases name an activation that was never computed.
HARMLESS = frozenset({"hidden_act", "cache_implementation"})
FIXED = {"use_bidirectional_attention": (False,)}

GEMMA2 = llama.like_llama(
    "gemma2",
    "Gemma2ForCausalLM",
    *SETTINGS,
    Setting("attention_softcap", "attn_logit_softcapping", 50.0),
    Setting("head_softcap", "final_logit_softcapping", 30.0),
    max_position_embeddings=8192,
    tie_embeddings=True,
    gguf="gemma2",
    groups=(rope(), alternating_windows(window=4096, every=2, every_key=None)),
    constants=CONSTANTS,
    fixed=FIXED,
    harmless=HARMLESS,
    weights=(*BODY, *LAST),
)
