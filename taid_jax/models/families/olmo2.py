"""OLMo 2: norms after the sublayers, and over all queries and all keys together."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import ACTIVATIONS, Family, Setting, Weight
from taid_jax.models.families.rope import rope

OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    settings=(
        *llama.SIZES,
        llama.HEAD_DIM,
        Setting("max_position_embeddings", "max_position_embeddings", 2048),
        Setting("norm_eps", "rms_norm_eps", 1e-5),
        Setting("tie_embeddings", "tie_word_embeddings", False),
        Setting("attention_bias", "attention_bias", False),
        Setting("activation", "hidden_act", "silu", ACTIVATIONS),
    ),
    groups=(rope(),),
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
    buffers=llama.ROTARY_BUFFERS,
)
