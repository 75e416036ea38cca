"""Gemma 3, text alone: Gemma 2 with normed heads and two kinds of rotary positions."""

import dataclasses

from taid_jax.models.families import llama
from taid_jax.models.families.family import Family, Setting
from taid_jax.models.families.gemma2 import (
    BOTH_NORMS,
    FINAL_NORM,
    FIXED,
    HARMLESS,
    SETTINGS,
)
from taid_jax.models.families.rope import rope
from taid_jax.models.families.windows import alternating_windows

GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    gguf="gemma3",
    settings=(
        *SETTINGS,
        Setting("max_position_embeddings", "max_position_embeddings", 131072),
        Setting("head_softcap", "final_logit_softcapping", None),
    ),
    groups=(
        rope(theta=1e6, local_theta=1e4),
        alternating_windows(window=4096, every=6, every_key="sliding_window_pattern"),
    ),
    constants={
        "norm": "rms_plus_one",
        "norm_place": "both",
        "qk_norm": "head",
        "scale_embedding": True,
    },
    # The attention's cap is a setting that transformers reads and never applies.
    fixed={**FIXED, "attn_logit_softcapping": ()},
    harmless=HARMLESS,
    weights=(
        llama.EMBED,
        *BOTH_NORMS,
        *llama.ATTENTION,
        *(dataclasses.replace(norm, gguf_offset=1.0) for norm in llama.HEAD_NORMS),
        *llama.MLP,
        FINAL_NORM,
        llama.LAST[1],
    ),
    buffers=llama.ROTARY_BUFFERS,
)
