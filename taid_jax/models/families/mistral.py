"""Mistral 7B and its kin: Llama with a sliding window."""

from taid_jax.models.families.family import Setting
from taid_jax.models.families.llama import like_llama

MISTRAL = like_llama(
    "mistral",
    "MistralForCausalLM",
    Setting("window", "sliding_window", 4096),
    max_position_embeddings=4096 * 32,
)
