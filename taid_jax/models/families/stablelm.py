"""StableLM: LayerNorm, partly turned heads, and where asked parallel residuals."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import ACTIVATIONS, Family, Setting, Weight
from taid_jax.models.families.rope import rope

STABLELM = Family(
    name="stablelm",
    architecture="StableLmForCausalLM",
    settings=(
        *llama.SIZES,
        Setting("head_dim", None, lambda got: got["d_model"] // got["num_heads"]),
        Setting("max_position_embeddings", "max_position_embeddings", 4096),
        Setting("norm_eps", "layer_norm_eps", 1e-5),
        Setting("tie_embeddings", "tie_word_embeddings", False),
        Setting("qkv_bias", "use_qkv_bias", False),
        Setting("activation", "hidden_act", "silu", ACTIVATIONS),
        Setting(
            "residual",
            "use_parallel_residual",
            False,
            {True: "parallel_one_norm", False: "sequential"},
        ),
        Setting("qk_norm", "qk_layernorm", False, {True: "each_head", False: "none"}),
    ),
    groups=(rope(partial=0.25),),
    constants={"norm": "layer"},
    weights=(
        llama.EMBED,
        *llama.NORMS,
        *llama.ATTENTION,
        # One tensor for each head.
        Weight(
            "layers.attention.q_norm",
            "self_attn.q_layernorm.norms.{n}",
            "",
            "n h -> n h",
        ),
        Weight(
            "layers.attention.k_norm",
            "self_attn.k_layernorm.norms.{k}",
            "",
            "k h -> k h",
        ),
        *llama.MLP,
        *llama.LAST,
    ),
    buffers=llama.ROTARY_BUFFERS,
)
