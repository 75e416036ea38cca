"""Qwen 3: each head's queries and keys are normed; heads have a width of their own."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import Setting
from taid_jax.models.families.rope import rope
from taid_jax.models.families.windows import LAST_WINDOWS

QWEN3 = llama.like_llama(
    "qwen3",
    "Qwen3ForCausalLM",
    Setting("head_dim", "head_dim", 128),
    llama.ATTENTION_BIAS,
    max_position_embeddings=32768,
    gguf="qwen3",
    groups=(rope(), LAST_WINDOWS),
    constants={"qk_norm": "head"},
    weights=(*llama.BODY, *llama.HEAD_NORMS, *llama.LAST),
)
