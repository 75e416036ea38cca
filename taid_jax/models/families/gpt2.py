"""GPT-2: learned positions, and matrices that are stored with their inputs first."""

from taid_jax.models.families.family import (
    ACTIVATIONS,
    Family,
    Setting,
    Weight,
    side_by_side,
)
from taid_jax.models.families.llama import head_dim

_ACTIVATIONS = {"gelu_new": "gelu_tanh", **ACTIVATIONS}
# Stored with their inputs first, and so side by side in columns.
_QKV = tuple(
    Weight(f"layers.attention.{letter}_proj", "", "", f"d ({heads} h) -> d {heads} h")
    for letter, heads in zip("qkv", "nkk", strict=True)
)

GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    settings=(
        Setting("padded_vocab_size", "vocab_size", 50257),
        Setting("d_model", "n_embd", 768),
        Setting("num_layers", "n_layer", 12),
        Setting("num_heads", "n_head", 12),
        Setting("num_kv_heads", None, lambda got: got["num_heads"]),
        Setting("head_dim", None, head_dim),
        Setting("mlp_dim", "n_inner", lambda got: 4 * got["d_model"]),
        Setting("max_position_embeddings", "n_positions", 1024),
        Setting("norm_eps", "layer_norm_epsilon", 1e-5),
        Setting("initializer_range", "initializer_range", 0.02),
        Setting("tie_embeddings", "tie_word_embeddings", True),
        Setting("activation", "activation_function", "gelu_new", _ACTIVATIONS),
    ),
    groups=(),
    constants={
        "norm": "layer",
        "rope": None,
        "learned_positions": True,
        "gated_mlp": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    harmless=frozenset(
        {
            *("n_ctx", "reorder_and_upcast_attn"),
            *("summary_activation", "summary_first_dropout", "summary_type"),
            *("summary_proj_to_labels", "summary_use_proj"),
        }
    ),
    weights=(
        Weight("embed", "transformer.wte", "", "v d -> v d"),
        Weight("positions", "transformer.wpe", "", "p d -> p d"),
        Weight("layers.attention_norm", "ln_1", "", "d -> d"),
        *side_by_side(_QKV, "attn.c_attn", "", ("n h", "k h", "k h"), axis=1),
        Weight("layers.attention.o_proj", "attn.c_proj", "", "(n h) d -> n h d"),
        Weight("layers.mlp_norm", "ln_2", "", "d -> d"),
        Weight("layers.mlp.up_proj", "mlp.c_fc", "", "d f -> d f"),
        Weight("layers.mlp.down_proj", "mlp.c_proj", "", "f d -> f d"),
        Weight("final_norm", "transformer.ln_f", "", "d -> d"),
        Weight("lm_head", "lm_head", "", "v d -> d v"),
    ),
    hf_layer="transformer.h.{layer}.",
    # Early versions of transformers saved them with the weights.
    buffers={
        r"transformer\.h\.\d+\.attn\.bias": "causal_mask",
        r"transformer\.h\.\d+\.attn\.masked_bias": "masked_score",
    },
)
