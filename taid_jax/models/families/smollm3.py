"""SmolLM 3: Llama in which every fourth layer has no rotary positions."""

from taid_jax.models.families import llama
from taid_jax.models.families.family import ACTIVATIONS, Family, Setting
from taid_jax.models.families.rope import rope
from taid_jax.models.families.windows import UNTURNED_LAYERS

SMOLLM3 = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    settings=(
        *llama.SIZES,
        llama.HEAD_DIM,
        Setting("max_position_embeddings", "max_position_embeddings", 32768),
        Setting("norm_eps", "rms_norm_eps", 1e-6),
        Setting("tie_embeddings", "tie_word_embeddings", True),
        Setting("attention_bias", "attention_bias", False),
        Setting("mlp_bias", "mlp_bias", False),
        Setting("activation", "hidden_act", "silu", ACTIVATIONS),
    ),
    groups=(rope(theta=2e6), UNTURNED_LAYERS),
    harmless=frozenset({"max_window_layers"}),
    weights=(llama.EMBED, *llama.NORMS, *llama.ATTENTION, *llama.MLP, *llama.LAST),
    buffers=llama.ROTARY_BUFFERS,
)
