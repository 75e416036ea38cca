"""Qwen 2 and 2.5: Llama with a bias on queries, keys and values."""

from taid_jax.models.families.llama import like_llama
from taid_jax.models.families.rope import rope
from taid_jax.models.families.windows import LAST_WINDOWS

QWEN2 = like_llama(
    "qwen2",
    "Qwen2ForCausalLM",
    max_position_embeddings=32768,
    gguf="qwen2",
    groups=(rope(), LAST_WINDOWS),
    constants={"qkv_bias": True},
)
