"""Qwen 3: each head's queries and keys are normed; heads have a width of their own."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import ACTIVATIONS, Family, Setting
from taid_jax.models.families.rope import rope
from taid_jax.models.families.windows import LAST_WINDOWS

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    gguf="qwen3",
    settings=(
        *llama.SIZES,
        Setting("head_dim", "head_dim", 128),
        Setting("max_position_embeddings", "max_position_embeddings", 32768),
        Setting("norm_eps", "rms_norm_eps", 1e-6),
        Setting("tie_embeddings", "tie_word_embeddings", False),
        Setting("attention_bias", "attention_bias", False),
        Setting("activation", "hidden_act", "silu", ACTIVATIONS),
    ),
    groups=(rope(), LAST_WINDOWS),
    constants={"qk_norm": "head"},
    weights=(
        llama.EMBED,
        *llama.NORMS,
        *llama.ATTENTION,
        *llama.HEAD_NORMS,
        *llama.MLP,
        *llama.LAST,
    ),
    buffers=llama.ROTARY_BUFFERS,
)
