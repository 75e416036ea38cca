"""Every family out and in again: bit for bit, and as transformers reads it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.models.decoder import abstract_params, decoder_functions
from taid_jax.models.families import FAMILIES, read_config
from taid_jax.models.files.export import export_model
from taid_jax.models.files.load import load_model

USUAL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SMALLER = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 12,
}
LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 8.0],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OWN = {"head_dim": 6}
HALF = {"partial_rotary_factor": 0.5}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 20}
VARIANTS = {
    "llama": [
        {**USUAL, **OWN, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**USUAL, "attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3},
        {**USUAL, **SMALLER, "tie_word_embeddings": True},
    ],
    "mistral": [
        {**USUAL, **OWN, "sliding_window": 7},
        {**USUAL, **SMALLER, "sliding_window": None, "tie_word_embeddings": True},
    ],
    "qwen2": [
        USUAL,
        {
            **USUAL,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
        {**USUAL, **SMALLER},
    ],
    "qwen3": [
        {**USUAL, **OWN},
        {
            **USUAL,
            **OWN,
            **SMALLER,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ],
    "olmo2": [{**USUAL, **SMALLER, "tie_word_embeddings": True}, USUAL],
    "smollm3": [
        {**USUAL, "no_rope_layers": [1, 0, 1]},
        {**USUAL, **SMALLER, "tie_word_embeddings": False},
    ],
    "stablelm": [
        {**USUAL, **HALF, "qk_layernorm": True},
        {**USUAL, **HALF, "use_parallel_residual": True, "use_qkv_bias": True},
        {**USUAL, **HALF, "tie_word_embeddings": True},
    ],
    "gemma2": [
        {**USUAL, **OWN, "sliding_window": 5, "query_pre_attn_scalar": 7},
        {**USUAL, **OWN, **SMALLER, "attn_logit_softcapping": None},
    ],
    "gemma3_text": [
        {**USUAL, **OWN, "sliding_window": 5, "sliding_window_pattern": 2},
        {
            **USUAL,
            **OWN,
            "num_hidden_layers": 7,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ],
    "phi3": [
        {**USUAL, "sliding_window": 6},
        {**USUAL, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
        {
            **USUAL,
            "original_max_position_embeddings": 16,
            "rope_scaling": LONG_ROPE,
            "num_key_value_heads": 4,
        },
    ],
    "gpt_neox": [
        {**USUAL, "rotary_pct": 0.5},
        {**USUAL, "use_parallel_residual": False, "rotary_pct": 1.0},
        {**USUAL, "hidden_size": 24, "attention_bias": False, "rotary_pct": 0.4},
    ],
    "gpt2": [
        GPT2,
        {**GPT2, "n_inner": 20, "n_head": 2, "n_layer": 1},
        {**GPT2, "tie_word_embeddings": False, "activation_function": "relu"},
    ],
}
CASES = [
    (family, index)
    for family, variants in VARIANTS.items()
    for index in range(len(variants))
]
# The first variant of each family always, the others where there is time.
WITH_TORCH = [
    pytest.param(*case, marks=[pytest.mark.slow] if case[1] else []) for case in CASES
]


def config_of(family, index=0):
    values = dict(VARIANTS[family][index])
    if family == "gpt_neox":
        del values["num_key_value_heads"]
    return read_config({"model_type": family, **values}, f"{family}-{index}")


def random_params(config, seed=0):
    """Scales near one and products of the order of one, so that everything shows."""
    generator = np.random.default_rng(seed)

    def leaf(path, shape):
        noise = generator.normal(size=shape.shape)
        if path[-1].key == "scale" and config.norm != "rms_plus_one":
            return jnp.asarray(1 + 0.3 * noise, jnp.float32)
        if path[-1].key in ("scale", "bias"):
            return jnp.asarray(0.3 * noise, jnp.float32)
        return jnp.asarray(0.25 * noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_variants_cover_every_family():
    assert VARIANTS.keys() == {family.name for family in FAMILIES}


@pytest.mark.parametrize(("family", "index"), CASES)
def test_export_model_is_read_back_bit_for_bit(tmp_path, family, index):
    config = config_of(family, index)
    dtype = ("float32", "bfloat16")[index % 2]
    before = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(config))
    export_model(tmp_path / "m", config, before, max_shard_bytes=4000)
    after = load_model(tmp_path / "m", dtype=dtype)
    assert after.config == config
    assert jax.tree.structure(after.params) == jax.tree.structure(before)
    same(after.params, before)
    # And out once more: the same bytes.
    export_model(tmp_path / "n", after.config, after.params, max_shard_bytes=4000)
    for path in (tmp_path / "m").iterdir():
        assert path.read_bytes() == (tmp_path / "n" / path.name).read_bytes()


@pytest.mark.parametrize(("family", "index"), WITH_TORCH)
def test_export_model_gives_transformers_the_same_model(
    tmp_path, caplog, family, index
):
    torch = pytest.importorskip("torch", reason="transformers computes with PyTorch")
    transformers = pytest.importorskip("transformers")
    config = config_of(family, index)
    params = random_params(config)
    export_model(tmp_path / "m", config, params)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", output_loading_info=True, attn_implementation="eager"
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert not any(info.values()), info
    warnings = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    # Transformers 4 refuses the field that transformers 5 would rather see; it says so
    # of the published models as well.
    assert [text for text in warnings if "set the `factor` field" not in text] == []
    architecture = next(f.architecture for f in FAMILIES if f.name == family)
    assert type(model).__name__ == architecture
    # Beyond the windows, and beyond the original context of the longrope.
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    functions = decoder_functions(config)
    batch = {"input_ids": jnp.asarray(ids, jnp.int32)}
    hidden = jax.jit(functions.hidden)(params, batch)
    ours = np.asarray(functions.head(params).logits(hidden))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    scale = np.abs(theirs).max()
    assert scale > 0.5
    # Asked for: 1e-4 of the scale of the logits; both sides round in their own order.
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * scale, rtol=0)
    # What transformers writes in its turn is the same model again.
    model.save_pretrained(tmp_path / "theirs")
    after = load_model(tmp_path / "theirs")
    assert after.config == config
    same(after.params, params)
