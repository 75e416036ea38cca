"""Hugging Face folders in: the numbers that transformers wrote, and broken folders."""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.files.export import export_model
from taid_jax.models.files.hf import INDEX, WEIGHTS, open_folder
from taid_jax.models.files.load import load_config, load_model, open_model
from taid_jax.models.rope import rope_frequencies

SMALL = DecoderConfig(
    vocab_size=12,
    d_model=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=6,
    max_position_embeddings=16,
)


@pytest.fixture
def folder(tmp_path, random_params):
    """A folder with one file of weights."""
    export_model(tmp_path / "model", SMALL, random_params(SMALL))
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path, random_params):
    """The same in several files."""
    params = random_params(SMALL)
    export_model(tmp_path / "sharded", SMALL, params, max_shard_bytes=1000)
    return tmp_path / "sharded"


def change(folder, **tensors):
    """Replaces tensors of the only file; None takes one away."""
    values = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del values[name]
        else:
            values[name] = tensor
    save_file(values, folder / WEIGHTS)


def relist(folder, names):
    """Changes files of tensors in the index; None takes a tensor out of it."""
    index = json.loads((folder / INDEX).read_text())
    listed = index["weight_map"] | names
    index["weight_map"] = {k: v for k, v in listed.items() if v is not None}
    (folder / INDEX).write_text(json.dumps(index))


def files_of(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_load_model_keeps_every_bit_that_pytorch_wrote(tmp_path, tiny_settings, dtype):
    reason = "PyTorch writes the reference model, and this environment has none"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**tiny_settings, attention_bias=True)
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "m", max_shard_size="2KB")
    loaded = load_model(tmp_path / "m")
    # float16 and bfloat16 are float32 numbers too.
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"float32"}
    export_model(tmp_path / "n", loaded.config, loaded.params, dtype=dtype)
    written = load_file(tmp_path / "n" / WEIGHTS)
    for name, tensor in model.state_dict().items():
        assert written[name].dtype.name == dtype
        expected = tensor.float().numpy()
        np.testing.assert_array_equal(written[name].astype("float32"), expected)


def test_load_model_rounds_to_the_dtype_asked_for(golden_teacher):
    wide = load_model(golden_teacher).params
    narrow = load_model(golden_teacher, dtype="bfloat16").params
    expected = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), wide)
    jax.tree.map(np.testing.assert_array_equal, narrow, expected)


def test_load_model_lists_all_tensors_that_do_not_fit(folder):
    change(
        folder,
        model__norm__weight=None,
        model__layers__1__mlp__up_proj__weight=None,
        model__layers__0__mlp__up_proj__weight=np.zeros((8, 6), np.float32),
        strange=np.zeros(3, np.float32),
    )
    text = refusal(folder)
    assert "4 differences" in text
    assert "missing: model.norm.weight, shape (8,)" in text
    assert "missing: model.layers.1.mlp.up_proj.weight" in text
    assert "wrong shape: model.layers.0.mlp.up_proj.weight has (8, 6), " in text
    assert "needs (6, 8)" in text
    assert "unexpected: strange" in text


def tie(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": True})
    )


def test_load_model_tolerates_tensors_that_say_nothing_new(folder):
    tie(folder)
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    frequencies = rope_frequencies(RopeConfig(), 4)
    change(
        folder,
        lm_head__weight=embedding,
        model__layers__0__self_attn__rotary_emb__inv_freq=frequencies,
        model__rotary_emb__original_inv_freq=frequencies.astype(np.float16),
    )
    loaded = load_model(folder)
    assert loaded.config.tie_embeddings
    assert "lm_head" not in loaded.params
    assert loaded.notes == ()
    np.testing.assert_array_equal(loaded.params["embed"]["embedding"], embedding)


@pytest.mark.parametrize("end", ["head", "last number", "other dtype", "none"])
def test_load_model_follows_a_head_that_differs(folder, monkeypatch, end):
    monkeypatch.setattr("taid_jax.models.files.weights._BLOCK", 8)  # Row by row.
    tie(folder)
    values = load_file(folder / WEIGHTS)
    head = values["lm_head.weight"]
    if end != "head":
        head = values["model.embed_tokens.weight"].copy()
    if end == "last number":
        head[-1, -1] += 1
    if end == "other dtype":
        head = head.astype(ml_dtypes.bfloat16)
    change(folder, lm_head__weight=head)
    loaded = load_model(folder)
    untied = end != "none"
    assert loaded.config.tie_embeddings is not untied
    assert load_config(folder) == loaded.config
    if untied:
        np.testing.assert_array_equal(loaded.params["lm_head"]["kernel"], head.T)
        [note] = loaded.notes
        assert "tie_word_embeddings is true" in note
    # What has no weights is what its config says.
    assert open_model(folder, weights=False).config.tie_embeddings


def test_load_model_untied_by_its_files_is_what_transformers_loads(folder, tmp_path):
    pytest.importorskip("torch", reason="transformers loads models with PyTorch")
    transformers = pytest.importorskip("transformers")
    tie(folder)
    loaded = load_model(folder)
    export_model(tmp_path / "again", loaded.config, loaded.params)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    for path in (folder, tmp_path / "again"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        theirs = model.lm_head.weight.detach().numpy().T
        np.testing.assert_array_equal(loaded.params["lm_head"]["kernel"], theirs)


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.input_layernorm.weight",
        "lm_head.bias",
    ],
)
def test_load_model_drops_no_tensor_without_a_word(folder, tensor):
    change(folder, **{tensor.replace(".", "__"): np.full(2, 0.5, np.float32)})
    text = refusal(folder)
    assert tensor in text
    assert "--allow-unknown-keys" in text
    loaded = load_model(folder, allow_unknown_keys=True)
    assert loaded.notes == (f"1 unknown settings or tensors left out: {tensor}",)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.module.", "base_model.model.", "model."]
)
def test_load_model_leaves_out_what_all_names_begin_with(folder, prefix):
    before = load_model(folder)
    values = load_file(folder / WEIGHTS)
    save_file({prefix + name: each for name, each in values.items()}, folder / WEIGHTS)
    after = load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert before.notes == ()
    assert all(word in "".join(after.notes) for word in prefix.split(".")[:-1])
    if prefix.endswith("model."):
        return  # Then it would be the family's own first word.
    save_file(
        {prefix + name.removeprefix("model."): each for name, each in values.items()},
        folder / WEIGHTS,
    )
    short = load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, short.params, before.params)


def test_load_model_leaves_out_wrappers_within_names(sharded):
    before = load_model(sharded)
    files = files_of(sharded)

    def wrapped(name):
        for wrapper in ("_orig_mod", "_fsdp_wrapped_module"):
            name = name.replace("self_attn.", f"self_attn.{wrapper}.")
        return name

    for path in sharded.glob("*.safetensors"):
        values = load_file(path)
        save_file({wrapped(name): each for name, each in values.items()}, path)
    relist(sharded, dict.fromkeys(files) | {wrapped(k): v for k, v in files.items()})
    after = load_model(sharded)
    assert len(after.notes) == 2
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_load_model_keeps_a_prefix_that_not_all_names_have(folder):
    values = load_file(folder / WEIGHTS)
    norm = values.pop("model.norm.weight")
    values = {"student." + name: tensor for name, tensor in values.items()}
    save_file({**values, "teacher.model.norm.weight": norm}, folder / WEIGHTS)
    text = refusal(folder)
    assert "(42 differences)" in text
    assert "unexpected: student.model.layers.0." in text


def test_load_model_refuses_two_tensors_that_become_one(folder):
    change(folder, model__norm___orig_mod__weight=np.ones(8, np.float32))
    assert "model.norm._orig_mod.weight" in refusal(folder)


def test_load_model_refuses_a_tensor_that_two_files_have(sharded):
    first, second, *_ = sorted(set(files_of(sharded).values()))
    for name in (first, second):
        values = {**load_file(sharded / name), "model.norm.weight": np.ones(8, "f")}
        save_file(values, sharded / name)
    relist(sharded, {"model.norm.weight": None})
    assert "is in model-0000" in refusal(sharded)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["fifo", "loop", "device"])
def test_load_model_never_waits_for_what_is_no_file(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else name)
    assert f"{path} is no file" in refusal(folder)


def test_load_model_refuses_weights_that_are_no_floats(folder):
    change(folder, model__norm__weight=np.ones(8, np.int8))
    assert "model.norm.weight in model.safetensors is" in refusal(folder)


def test_load_model_refuses_a_folder_without_config(folder, tmp_path):
    (folder / "config.json").unlink()
    assert "has no config.json" in (text := refusal(folder))
    assert WEIGHTS in text
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("name", ["pytorch_model-1.bin", "x.pt"])
def test_load_model_refuses_pickles_and_says_how_to_convert(folder, name):
    (folder / WEIGHTS).rename(folder / name)
    text = refusal(folder)
    assert f"pickles only ({name})" in text
    assert "save_pretrained" in text


def test_load_model_tells_an_adapter_from_a_model(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert "an adapter, not a model" in refusal(folder)


def test_load_model_refuses_a_missing_shard(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    assert f"names files that are not there: {gone.name}" in refusal(sharded)
    relist(sharded, {"model.norm.weight": "x" * 5000 + ".safetensors"})
    assert len(refusal(sharded)) < 700


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "a\\b.safetensors", "x.bin", 3]
)
def test_load_model_never_follows_an_index_out_of_the_folder(sharded, file):
    relist(sharded, {"model.norm.weight": file})
    assert "only .safetensors files in the same folder" in refusal(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}'])
def test_load_model_refuses_an_index_without_map(sharded, content):
    (sharded / INDEX).write_text(content)
    assert "has no weight_map" in refusal(sharded)


def test_load_model_refuses_an_index_that_does_not_fit_its_files(sharded):
    files = files_of(sharded)
    wrong = next(f for f in files.values() if f != files["model.norm.weight"])
    relist(sharded, {"model.norm.weight": wrong})
    assert f"model.norm.weight is not in {wrong}" in refusal(sharded)


def test_open_folder_reads_no_weights(folder):
    tensors = open_folder(folder)
    assert tensors.shapes["lm_head.weight"] == (12, 8)
    # What is read is read when it is asked for: a file that is gone shows then.
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="damaged or no safetensors file"):
        tensors.read("lm_head.weight", (slice(0, 1), slice(0, 8)))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.999])
def test_load_model_refuses_a_truncated_file(folder, share):
    path = folder / WEIGHTS
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: int(size * share)])
    text = refusal(folder)
    assert str(path) in text
    assert "fetch it again" in text


def test_load_model_reads_through_links_as_the_hub_cache_has_them(folder, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    shutil.copytree(folder, tmp_path / "copy")
    jax.tree.map(
        np.testing.assert_array_equal,
        load_model(snapshot).params,
        load_model(tmp_path / "copy").params,
    )
