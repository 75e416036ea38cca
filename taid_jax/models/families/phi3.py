"""Phi-3 to 4: queries, keys and values in one tensor, gate and up in another."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import ACTIVATIONS, Family, Setting, Weight
from taid_jax.models.families.layout import Part
from taid_jax.models.families.rope import rope

_QKV, _GATE_UP = ("n h", "k h", "k h"), ("f", "f")
_LAYOUTS = {
    "q_proj": "(n h) d -> d n h",
    "k_proj": "(k h) d -> d k h",
    "v_proj": "(k h) d -> d k h",
}
# Early releases called it by other names.
_LONG = dict.fromkeys(("longrope", "su", "yarn"), "longrope")

PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    gguf="phi3",
    settings=(
        *llama.SIZES,
        llama.HEAD_DIM,
        Setting("max_position_embeddings", "max_position_embeddings", 4096),
        Setting("norm_eps", "rms_norm_eps", 1e-5),
        Setting("tie_embeddings", "tie_word_embeddings", False),
        Setting("activation", "hidden_act", "silu", ACTIVATIONS),
        Setting("window", "sliding_window", None),
    ),
    groups=(rope(partial=1.0, kinds={"default": "default"} | _LONG, original=4096),),
    fixed=dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), (False,)),
    harmless=frozenset(
        {
            # Of the code that came with some releases; transformers knows neither.
            *("full_attn_mod", "interpolate_factor"),
        }
    ),
    weights=(
        llama.EMBED,
        *llama.NORMS,
        *(
            Weight(
                f"layers.attention.{name}",
                "self_attn.qkv_proj",
                "attn_qkv",
                layout,
                part=Part(index, _QKV),
            )
            for index, (name, layout) in enumerate(_LAYOUTS.items())
        ),
        llama.ATTENTION[-1],
        *(
            Weight(
                f"layers.mlp.{name}",
                "mlp.gate_up_proj",
                "ffn_up",
                "f d -> d f",
                part=Part(index, _GATE_UP),
            )
            for index, name in enumerate(("gate_proj", "up_proj"))
        ),
        llama.MLP[-1],
        *llama.LAST,
    ),
    buffers=llama.ROTARY_BUFFERS,
    gguf_settings=frozenset({"rope_factors_long.weight", "rope_factors_short.weight"}),
)
