"""What most families share: the settings and tensors that go by the names of Llama."""

from collections.abc import Mapping

from taid_jax.models.families.family import Buffer, Setting, Weight
from taid_jax.models.families.fields import REQUIRED

SIZES = (
    Setting("padded_vocab_size", "vocab_size", REQUIRED),
    Setting("d_model", "hidden_size", REQUIRED),
    Setting("mlp_dim", "intermediate_size", REQUIRED),
    Setting("num_layers", "num_hidden_layers", REQUIRED),
    Setting("num_heads", "num_attention_heads", REQUIRED),
    Setting("num_kv_heads", "num_key_value_heads", REQUIRED),
    Setting("initializer_range", "initializer_range", 0.02),
)

HEAD_DIM = Setting(
    "head_dim", "head_dim", lambda got: got["d_model"] // got["num_heads"]
)

EMBED = Weight("embed", "model.embed_tokens", "token_embd", "v d -> v d")

NORMS = (
    Weight("layers.attention_norm", "input_layernorm", "attn_norm", "d -> d"),
    Weight("layers.mlp_norm", "post_attention_layernorm", "ffn_norm", "d -> d"),
)

ATTENTION = (
    Weight("layers.attention.q_proj", "self_attn.q_proj", "attn_q", "(n h) d -> d n h"),
    Weight("layers.attention.k_proj", "self_attn.k_proj", "attn_k", "(k h) d -> d k h"),
    Weight("layers.attention.v_proj", "self_attn.v_proj", "attn_v", "(k h) d -> d k h"),
    Weight(
        "layers.attention.o_proj", "self_attn.o_proj", "attn_output", "d (n h) -> n h d"
    ),
)

HEAD_NORMS = (
    Weight("layers.attention.q_norm", "self_attn.q_norm", "attn_q_norm", "h -> h"),
    Weight("layers.attention.k_norm", "self_attn.k_norm", "attn_k_norm", "h -> h"),
)

MLP = (
    Weight("layers.mlp.gate_proj", "mlp.gate_proj", "ffn_gate", "f d -> d f"),
    Weight("layers.mlp.up_proj", "mlp.up_proj", "ffn_up", "f d -> d f"),
    Weight("layers.mlp.down_proj", "mlp.down_proj", "ffn_down", "d f -> f d"),
)

LAST = (
    Weight("final_norm", "model.norm", "output_norm", "d -> d"),
    Weight("lm_head", "lm_head", "output", "v d -> d v"),
)

ROTARY_BUFFERS: Mapping[str, Buffer] = {
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq": (
        "rope_frequencies"
    )
}
"""Some checkpoints carry them though they follow from the config."""
