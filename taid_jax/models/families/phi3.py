"""Phi-3 to 4: queries, keys and values in one tensor, gate and up in another."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import Setting, side_by_side
from taid_jax.models.families.rope import rope

# Early releases called it by other names.
_LONG = dict.fromkeys(("longrope", "su", "yarn"), "longrope")

PHI3 = llama.like_llama(
    "phi3",
    "Phi3ForCausalLM",
    Setting("window", "sliding_window", None),
    max_position_embeddings=4096,
    norm_eps=1e-5,
    gguf="phi3",
    groups=(rope(partial=1.0, kinds={"default": "default"} | _LONG, original=4096),),
    fixed=dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), (False,)),
    # Of the code that came with some releases; transformers knows neither.
    harmless=frozenset({"full_attn_mod", "interpolate_factor"}),
    weights=(
        llama.EMBED,
        *llama.NORMS,
        *side_by_side(
            llama.ATTENTION[:3],
            hf="self_attn.qkv_proj",
            gguf="attn_qkv",
            sizes=("n h", "k h", "k h"),
        ),
        llama.ATTENTION[-1],
        *side_by_side(llama.MLP[:2], "mlp.gate_up_proj", "ffn_up", ("f", "f")),
        llama.MLP[-1],
        *llama.LAST,
    ),
    gguf_settings=frozenset({"rope_factors_long.weight", "rope_factors_short.weight"}),
)
