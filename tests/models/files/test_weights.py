"""Tensors that hold several modules: on a mesh, under other names, and damaged."""

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taid_jax.errors import ModelError
from taid_jax.models.decoder import abstract_params, param_axes
from taid_jax.models.families import family_named, read_config
from taid_jax.models.files.export import export_model
from taid_jax.models.files.hf import WEIGHTS
from taid_jax.models.files.load import load_model
from taid_jax.models.rope import rope_frequencies
from taid_jax.sharding import make_mesh, tree_shardings

USUAL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
MODELS = {
    "phi3": {**USUAL, "num_key_value_heads": 2},
    "gpt_neox": {**USUAL, "rotary_pct": 0.5},
    "gpt2": {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 4},
    "stablelm": {
        **USUAL,
        "num_key_value_heads": 2,
        "qk_layernorm": True,
        "partial_rotary_factor": 0.5,
    },
}


def config_of(name):
    return read_config({"model_type": name, **MODELS[name]}, name)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def change(folder, changes):
    """Replaces tensors of the only file; None takes one away."""
    values = load_file(folder / WEIGHTS) | changes
    kept = {name: tensor for name, tensor in values.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS)


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    return str(caught.value)


@pytest.fixture
def write(tmp_path, random_params):
    def make(name):
        config = config_of(name)
        params = random_params(config)
        export_model(tmp_path / name, config, params)
        return tmp_path / name, config, params

    return make


@pytest.mark.multidevice
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*stays whole on each device")
def test_load_model_places_every_piece_where_it_belongs(write, name):
    folder, config, params = write(name)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    where = tree_shardings(param_axes(config), abstract_params(config), mesh)
    placed = load_model(folder, shardings=where).params
    same(placed, params)
    for leaf, sharding in zip(
        jax.tree.leaves(placed), jax.tree.leaves(where), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
def test_load_model_takes_the_names_of_the_model_without_a_head(write, name):
    folder, _, params = write(name)
    start = family_named(name).hf_layer.partition(".")[0] + "."
    values = load_file(folder / WEIGHTS)
    save_file({k.removeprefix(start): v for k, v in values.items()}, folder / WEIGHTS)
    same(load_model(folder).params, params)


def test_load_model_tolerates_masks_of_early_releases(write):
    folder, config, params = write("gpt_neox")
    mask = np.tri(8, dtype=bool)[None, None]
    attention = "gpt_neox.layers.0.attention."
    frequencies = rope_frequencies(config.rope, config.head_dim)
    change(
        folder,
        {
            attention + "bias": mask,
            attention + "masked_bias": np.array(-1e9, np.float32),
            attention + "rotary_emb.inv_freq": frequencies.astype(ml_dtypes.bfloat16),
        },
    )
    same(load_model(folder).params, params)
    folder, _, params = write("gpt2")
    change(folder, {"transformer.h.1.attn.bias": mask.astype(np.uint8)})
    same(load_model(folder).params, params)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn.bias", np.tri(8, k=1, dtype=np.uint8)[None, None]),
        ("attn.bias", np.ones(48, np.float32)),
        ("attn.masked_bias", np.array(-5.0, np.float32)),
        ("attn.masked_bias", np.array(np.nan, np.float32)),
    ],
)
def test_load_model_refuses_masks_that_are_others(write, name, value):
    folder, _, params = write("gpt2")
    change(folder, {f"transformer.h.1.{name}": value})
    assert f"not what the config gives: transformer.h.1.{name}" in refusal(folder)
    loaded = load_model(folder, allow_unknown_keys=True)
    assert name in "".join(loaded.notes)
    same(loaded.params, params)


def test_load_model_still_refuses_integers_among_the_weights(write):
    folder, _, _ = write("gpt_neox")
    name = "gpt_neox.layers.0.attention.query_key_value.bias"
    change(folder, {name: np.zeros(48, np.uint8)})
    assert f"{name} in {WEIGHTS} is U8" in refusal(folder)


def test_load_model_lists_all_fused_tensors_that_do_not_fit(write):
    folder, _, _ = write("phi3")
    at = "model.layers.{}.self_attn.qkv_proj.weight".format
    change(
        folder,
        {
            at(0): np.zeros((31, 16), np.float32),
            at(1): None,
            "model.layers.1.self_attn.q_proj.weight": np.zeros((16, 16), np.float32),
            "model.layers.1.mlp.gate_up_proj.weight": np.zeros((48, 15), np.float32),
        },
    )
    text = refusal(folder)
    assert "(4 differences)" in text
    assert f"wrong shape: {at(0)} has (31, 16), the config needs (32, 16)" in text
    assert f"missing: {at(1)}, shape (32, 16)" in text
    assert "unexpected: model.layers.1.self_attn.q_proj.weight" in text
    assert "gate_up_proj.weight has (48, 15), the config needs (48, 16)" in text


def test_load_model_lists_the_heads_that_are_missing(write):
    folder, _, _ = write("stablelm")
    at = "model.layers.0.self_attn.q_layernorm.norms.{}.weight".format
    change(folder, {at(3): None, at(1): np.zeros(5, np.float32)})
    text = refusal(folder)
    assert f"missing: {at(3)}, shape (4,)" in text
    assert f"wrong shape: {at(1)} has (5,), the config needs (4,)" in text
