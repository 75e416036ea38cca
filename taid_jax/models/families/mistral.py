"""Mistral 7B and its kin: Llama with a sliding window."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import ACTIVATIONS, Family, Setting
from taid_jax.models.families.rope import rope

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    settings=(
        *llama.SIZES,
        llama.HEAD_DIM,
        Setting("max_position_embeddings", "max_position_embeddings", 4096 * 32),
        Setting("norm_eps", "rms_norm_eps", 1e-6),
        Setting("tie_embeddings", "tie_word_embeddings", False),
        Setting("activation", "hidden_act", "silu", ACTIVATIONS),
        Setting("window", "sliding_window", 4096),
    ),
    groups=(rope(),),
    weights=(llama.EMBED, *llama.NORMS, *llama.ATTENTION, *llama.MLP, *llama.LAST),
    buffers=llama.ROTARY_BUFFERS,
)
