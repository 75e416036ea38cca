"""StableLM: LayerNorm, partly turned heads, and where asked parallel residuals."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import Setting, Weight
from taid_jax.models.families.rope import rope

_RESIDUAL = {True: "parallel_one_norm", False: "sequential"}
_HEADS = "self_attn.{}_layernorm.norms.{{{}}}".format  # One tensor for each head.

STABLELM = llama.like_llama(
    "stablelm",
    "StableLmForCausalLM",
    Setting("head_dim", None, llama.head_dim),
    Setting("norm_eps", "layer_norm_eps", 1e-5),
    Setting("qkv_bias", "use_qkv_bias", False),
    Setting("residual", "use_parallel_residual", False, _RESIDUAL),
    Setting("qk_norm", "qk_layernorm", False, {True: "each_head", False: "none"}),
    max_position_embeddings=4096,
    groups=(rope(partial=0.25),),
    constants={"norm": "layer"},
    weights=(
        *llama.BODY,
        Weight("layers.attention.q_norm", _HEADS("q", "n"), "", "n h -> n h"),
        Weight("layers.attention.k_norm", _HEADS("k", "k"), "", "k h -> k h"),
        *llama.LAST,
    ),
)
