"""Qwen 2 and 2.5: Llama with a bias on queries, keys and values."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import ACTIVATIONS, Family, Setting
from taid_jax.models.families.rope import rope
from taid_jax.models.families.windows import LAST_WINDOWS

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    gguf="qwen2",
    settings=(
        *llama.SIZES,
        llama.HEAD_DIM,
        Setting("max_position_embeddings", "max_position_embeddings", 32768),
        Setting("norm_eps", "rms_norm_eps", 1e-6),
        Setting("tie_embeddings", "tie_word_embeddings", False),
        Setting("activation", "hidden_act", "silu", ACTIVATIONS),
    ),
    groups=(rope(), LAST_WINDOWS),
    constants={"qkv_bias": True},
    weights=(llama.EMBED, *llama.NORMS, *llama.ATTENTION, *llama.MLP, *llama.LAST),
    buffers=llama.ROTARY_BUFFERS,
)
