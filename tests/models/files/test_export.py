"""Hugging Face folders out: whole or not at all, and as transformers reads them."""

import dataclasses
import json
import os
import stat

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.files import export
from taid_jax.models.files.hf import INDEX, WEIGHTS
from taid_jax.models.files.load import export_model, load_model

CONFIG = DecoderConfig(
    vocab_size=20,
    d_model=8,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=12,
    max_position_embeddings=64,
    rope=RopeConfig(
        theta=5e4, kind="llama3", factor=2.0, original_max_position_embeddings=16
    ),
)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def params(random_params):
    return random_params(CONFIG)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_model_stores_the_dtype_asked_for(tmp_path, params, dtype):
    export_model(tmp_path / "m", CONFIG, params, dtype=dtype)
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), params)
    same(load_model(tmp_path / "m").params, expected)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    with safe_open(tmp_path / "m" / WEIGHTS, framework="np") as file:
        assert file.metadata() == {"format": "pt"}  # Transformers 4 needs it.


def test_export_model_writes_an_index_that_covers_every_tensor(tmp_path, params):
    export_model(tmp_path / "m", CONFIG, params, max_shard_bytes=2000)
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    files = {path.name for path in (tmp_path / "m").glob("model-*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(index["weight_map"]) == 2 + 1 + 9 * CONFIG.num_layers
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == total
    assert not (tmp_path / "m" / WEIGHTS).exists()


def test_export_model_fills_its_files_up_to_the_limit(tmp_path, params):
    # Keys and values have as many bytes together as queries have alone.
    limit = params["layers"]["attention"]["q_proj"]["kernel"][0].nbytes
    export_model(tmp_path / "m", CONFIG, params, max_shard_bytes=limit)
    found = [load_file(path) for path in (tmp_path / "m").glob("*.safetensors")]
    sizes = [sum(array.nbytes for array in file.values()) for file in found]
    assert max(sizes) == limit
    both = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv"}
    assert both in [file.keys() for file in found]


def test_export_model_writes_generation_settings(tmp_path, params):
    generation = {"eos_token_id": [3, 4], "temperature": 0.5, "do_sample": True}
    export_model(tmp_path / "m", CONFIG, params, generation=generation)
    loaded = load_model(tmp_path / "m")
    assert {key: loaded.generation[key] for key in generation} == generation
    assert json.loads((tmp_path / "m/config.json").read_text())["eos_token_id"] == [
        3,
        4,
    ]


@pytest.mark.parametrize("pad", [17, -1, "x"])
def test_export_model_names_no_padding_that_the_folder_lacks(tmp_path, params, pad):
    config = dataclasses.replace(CONFIG, vocab_size=15)
    generation = {"pad_token_id": pad, "eos_token_id": 3}
    export_model(tmp_path / "m", config, params, generation=generation)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "m" / name).read_text())
        assert (values["pad_token_id"], values["eos_token_id"]) == (None, 3)


def test_export_model_lets_others_read_as_the_user_wants(tmp_path, params):
    old = os.umask(0o022)
    try:
        export_model(tmp_path / "m", CONFIG, params)
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").iterdir()}
    assert modes == {0o644}
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o755


@pytest.mark.parametrize("replace", [False, True])
def test_export_model_never_overwrites_what_a_user_has(tmp_path, params, replace):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match=r"not empty \(it has thesis\.tex\)"):
        export_model(tmp_path / "m", CONFIG, params, replace=replace)
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "thesis.tex"]


def test_export_model_never_overwrites_a_file(tmp_path, params):
    (tmp_path / "m").write_text("precious")
    with pytest.raises(ModelError, match="is there and no folder"):
        export_model(tmp_path / "m", CONFIG, params, replace=True)
    assert (tmp_path / "m").read_text() == "precious"


def test_export_model_replaces_an_older_export_only_when_asked(tmp_path, random_params):
    first, second = random_params(CONFIG, seed=1), random_params(CONFIG, seed=2)
    export_model(tmp_path / "m", CONFIG, first, max_shard_bytes=2000)
    with pytest.raises(ModelError, match="not empty"):
        export_model(tmp_path / "m", CONFIG, second)
    same(load_model(tmp_path / "m").params, first)
    export_model(tmp_path / "m", CONFIG, second, replace=True)
    same(load_model(tmp_path / "m").params, second)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("there_before", [False, True])
def test_export_model_leaves_nothing_behind_when_it_fails(
    tmp_path, random_params, monkeypatch, there_before
):
    first = random_params(CONFIG, seed=1)
    if there_before:
        export_model(tmp_path / "m", CONFIG, first)
    written = []

    def full_disk(tensors, path, **options):
        assert (tmp_path / "m").exists() == there_before
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.write_bytes(b"part of a model")

    monkeypatch.setattr(export, "save_file", full_disk)
    with pytest.raises(ModelError, match="No space left on device"):
        export_model(
            tmp_path / "m", CONFIG, first, max_shard_bytes=2000, replace=there_before
        )
    assert written
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["m"] * there_before
    if there_before:
        same(load_model(tmp_path / "m").params, first)


def test_export_model_brings_the_older_export_back_when_renaming_fails(
    tmp_path, random_params, monkeypatch
):
    first = random_params(CONFIG, seed=1)
    export_model(tmp_path / "m", CONFIG, first)
    rename = type(tmp_path).rename

    def broken(path, target):
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", broken)
    with pytest.raises(ModelError, match="Input/output error"):
        export_model(tmp_path / "m", CONFIG, first, replace=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    same(load_model(tmp_path / "m").params, first)


def test_export_model_names_parameters_that_do_not_fit(tmp_path, params):
    wrong = {**params, "final_norm": {"scale": np.ones(9, np.float32)}}
    with pytest.raises(ModelError, match=r"final_norm\.scale has shape \(9,\)"):
        export_model(tmp_path / "m", CONFIG, wrong)
    del wrong["final_norm"]
    with pytest.raises(ModelError, match=r"final_norm\.scale is missing"):
        export_model(tmp_path / "m", CONFIG, wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(np.nan, None), (np.inf, "bfloat16"), (7e4, "float16"), (3.4e38, "bfloat16")],
)
def test_export_model_writes_no_number_that_is_none(tmp_path, params, value, dtype):
    head = params["lm_head"]["kernel"].at[3, 4].set(value)
    broken = {**params, "lm_head": {"kernel": head}}
    with pytest.raises(
        ModelError, match=r"lm_head\.weight has numbers that are not fi"
    ):
        export_model(tmp_path / "m", CONFIG, broken, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 300])
def test_export_model_refuses_names_that_no_file_can_have(tmp_path, params, name):
    with pytest.raises(ModelError, match="cannot be written") as caught:
        export_model(tmp_path / name, CONFIG, params)
    str(caught.value).encode()  # A console can print it.
    assert list(tmp_path.iterdir()) == []


def test_export_model_takes_a_name_as_long_as_names_can_be(tmp_path, params):
    export_model(tmp_path / ("x" * 255), CONFIG, params)
    same(load_model(tmp_path / ("x" * 255)).params, params)
