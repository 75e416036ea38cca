"""OLMo 2: norms after the sublayers, and over all queries and all keys together."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import Weight

OLMO2 = llama.like_llama(
    "olmo2",
    "Olmo2ForCausalLM",
    llama.ATTENTION_BIAS,
    max_position_embeddings=2048,
    norm_eps=1e-5,
    constants={"norm_place": "after", "qk_norm": "projection"},
    weights=(
        llama.EMBED,
        *llama.ATTENTION,
        Weight("layers.attention.q_norm", "self_attn.q_norm", "", "(n h) -> n h"),
        Weight("layers.attention.k_norm", "self_attn.k_norm", "", "(k h) -> k h"),
        Weight("layers.attention_post_norm", "post_attention_layernorm", "", "d -> d"),
        *llama.MLP,
        Weight("layers.mlp_post_norm", "post_feedforward_layernorm", "", "d -> d"),
        *llama.LAST,
    ),
)
