"""GPT-NeoX and Pythia: parallel residual, partial rotary positions, biases, GELU."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import ACTIVATIONS, Setting, Weight, side_by_side
from taid_jax.models.families.rope import rope

_RESIDUAL = {True: "parallel", False: "sequential"}

GPT_NEOX = llama.like_llama(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    Setting("num_kv_heads", None, lambda got: got["num_heads"]),
    Setting("head_dim", None, llama.head_dim),
    Setting("norm_eps", "layer_norm_eps", 1e-5),
    Setting("attention_bias", "attention_bias", True),
    Setting("activation", "hidden_act", "gelu", ACTIVATIONS),
    Setting("residual", "use_parallel_residual", True, _RESIDUAL),
    max_position_embeddings=2048,
    groups=(rope(theta_key="rotary_emb_base", partial_key="rotary_pct", partial=0.25),),
    constants={"norm": "layer", "gated_mlp": False, "mlp_bias": True},
    weights=(
        Weight("embed", "gpt_neox.embed_in", "", "v d -> v d"),
        Weight("layers.attention_norm", "input_layernorm", "", "d -> d"),
        # Of each head the rows of its queries, its keys and its values.
        *side_by_side(
            llama.ATTENTION[:3],
            hf="attention.query_key_value",
            gguf="",
            sizes=("h", "h", "h"),
            groups="n",
        ),
        Weight("layers.attention.o_proj", "attention.dense", "", "d (n h) -> n h d"),
        Weight("layers.mlp_norm", "post_attention_layernorm", "", "d -> d"),
        Weight("layers.mlp.up_proj", "mlp.dense_h_to_4h", "", "f d -> d f"),
        Weight("layers.mlp.down_proj", "mlp.dense_4h_to_h", "", "d f -> f d"),
        Weight("final_norm", "gpt_neox.final_layer_norm", "", "d -> d"),
        Weight("lm_head", "embed_out", "", "v d -> d v"),
    ),
    hf_layer="gpt_neox.layers.{layer}.",
    # Early versions of transformers saved them with the weights.
    buffers={
        r"gpt_neox\.layers\.\d+\.attention\.bias": "causal_mask",
        r"gpt_neox\.layers\.\d+\.attention\.masked_bias": "masked_score",
        r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq": "rope_frequencies",
    },
)
