"""Gemma 3, text alone: Gemma 2 with normed heads and two kinds of rotary positions."""

import dataclasses

from taid_jax.models.families import gemma2, llama
from taid_jax.models.families.family import Setting
from taid_jax.models.families.rope import rope
from taid_jax.models.families.windows import alternating_windows

GEMMA3 = llama.like_llama(
    "gemma3_text",
    "Gemma3ForCausalLM",
    *gemma2.SETTINGS,
    Setting("head_softcap", "final_logit_softcapping", None),
    max_position_embeddings=131072,
    tie_embeddings=True,
    gguf="gemma3",
    groups=(
        rope(theta=1e6, local_theta=1e4),
        alternating_windows(window=4096, every=6, every_key="sliding_window_pattern"),
    ),
    constants={**gemma2.CONSTANTS, "qk_norm": "head"},
    # The attention's cap is a setting that transformers reads and never applies.
    fixed={**gemma2.FIXED, "attn_logit_softcapping": ()},
    harmless=gemma2.HARMLESS,
    weights=(
        *gemma2.BODY,
        *(dataclasses.replace(norm, gguf_offset=1.0) for norm in llama.HEAD_NORMS),
        *gemma2.LAST,
    ),
)
