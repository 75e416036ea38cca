"""SmolLM 3: Llama in which every fourth layer has no rotary positions."""

from taid_jax.models.families import llama
from taid_jax.models.families.rope import rope
from taid_jax.models.families.windows import UNTURNED_LAYERS

SMOLLM3 = llama.like_llama(
    "smollm3",
    "SmolLM3ForCausalLM",
    llama.ATTENTION_BIAS,
    llama.MLP_BIAS,
    max_position_embeddings=32768,
    tie_embeddings=True,
    groups=(rope(theta=2e6), UNTURNED_LAYERS),
    harmless=frozenset({"max_window_layers"}),
)
