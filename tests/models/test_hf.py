"""Hugging Face folders in: the numbers that transformers wrote, and broken folders."""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.decoder import decoder_functions
from taid_jax.models.files.export import export_model
from taid_jax.models.files.hf import INDEX, WEIGHTS, open_folder
from taid_jax.models.files.load import load_config, load_model
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


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    return str(caught.value)


def expected_params(state, config):
    """The parameter tree, spelled out by hand from PyTorch's names and shapes."""
    heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
    layers = range(config.num_layers)

    def stack(name, turn=lambda array: array):
        return np.stack([turn(state[f"model.layers.{i}.{name}"]) for i in layers])

    def into_heads(count):
        return lambda matrix: matrix.T.reshape(config.d_model, count, width)

    def linear(name, turn, bias):
        found = {"kernel": stack(f"{name}.weight", turn)}
        if f"model.layers.0.{name}.bias" in state:
            found["bias"] = stack(f"{name}.bias", bias)
        return found

    def projection(name, count):
        return linear(name, into_heads(count), lambda b: b.reshape(count, width))

    def turned(name):
        return linear(name, lambda matrix: matrix.T, lambda bias: bias)

    output = linear(
        "self_attn.o_proj",
        lambda matrix: matrix.T.reshape(heads, width, config.d_model),
        lambda bias: bias,
    )
    params = {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "layers": {
            "attention_norm": {"scale": stack("input_layernorm.weight")},
            "attention": {
                "q_proj": projection("self_attn.q_proj", heads),
                "k_proj": projection("self_attn.k_proj", groups),
                "v_proj": projection("self_attn.v_proj", groups),
                "o_proj": output,
            },
            "mlp_norm": {"scale": stack("post_attention_layernorm.weight")},
            "mlp": {
                "gate_proj": turned("mlp.gate_proj"),
                "up_proj": turned("mlp.up_proj"),
                "down_proj": turned("mlp.down_proj"),
            },
        },
        "final_norm": {"scale": state["model.norm.weight"]},
    }
    if not config.tie_embeddings:
        params["lm_head"] = {"kernel": state["lm_head.weight"].T}
    return params


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 6},
        {"num_key_value_heads": 1, "num_hidden_layers": 1},
        {"dtype": "bfloat16"},
        {"dtype": "float16", "max_shard_size": "2KB"},
        {"max_shard_size": "4KB", "tie_word_embeddings": True},
    ],
    ids=["plain", "tied", "biases", "one-layer", "bf16", "f16-shards", "tied-shards"],
)
def test_load_model_gives_the_weights_that_pytorch_has(write_llama, tmp_path, changes):
    model = write_llama(tmp_path / "model", **changes)
    loaded = load_model(tmp_path / "model")
    state = {name: t.float().numpy() for name, t in model.state_dict().items()}
    expected = expected_params(state, loaded.config)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected)
    # Bit for bit: float16 and bfloat16 are float32 numbers too.
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"float32"}


def test_load_model_reads_the_recorded_folder_bit_for_bit(golden_teacher):
    loaded = load_model(golden_teacher)
    expected = expected_params(load_file(golden_teacher / WEIGHTS), loaded.config)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


def test_load_model_rounds_to_the_dtype_asked_for(golden_teacher):
    wide = load_model(golden_teacher).params
    narrow = load_model(golden_teacher, dtype="bfloat16").params
    expected = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), wide)
    jax.tree.map(np.testing.assert_array_equal, narrow, expected)


def test_load_model_reads_shards_like_one_file(folder, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 3
    one, many = load_model(folder).params, load_model(sharded).params
    jax.tree.map(np.testing.assert_array_equal, one, many)


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


def test_load_model_needs_the_head_of_an_untied_model(folder):
    change(folder, lm_head__weight=None)
    assert "missing: lm_head.weight, shape (12, 8)" in refusal(folder)


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


@pytest.mark.parametrize("block", [1 << 24, 8], ids=["whole", "row by row"])
@pytest.mark.parametrize("end", ["head", "last number", "other dtype", "none"])
def test_load_model_follows_a_head_that_differs(folder, monkeypatch, block, end):
    monkeypatch.setattr("taid_jax.models.files.weights._BLOCK", block)
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
    assert load_config(folder, weights=False).tie_embeddings


def test_load_model_untied_by_its_files_is_what_transformers_loads(folder, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers computes with PyTorch")
    transformers = pytest.importorskip("transformers")
    tie(folder)
    loaded = load_model(folder)
    export_model(tmp_path / "again", loaded.config, loaded.params)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    ids = np.random.default_rng(0).integers(0, 12, (2, 9))
    functions = decoder_functions(loaded.config)
    hidden = functions.hidden(loaded.params, {"input_ids": ids.astype(np.int32)})
    ours = np.asarray(functions.head(loaded.params).logits(hidden))
    for path in (folder, tmp_path / "again"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            theirs = model(torch.tensor(ids)).logits.numpy()
        # Both sides round in their own order; a head that is lost shows by far more.
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.layers.7.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.mlp.gate.weight",
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
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "base_model.model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "student.",
    ],
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
    index = json.loads((sharded / INDEX).read_text())

    def wrapped(name):
        for wrapper in ("_orig_mod", "_fsdp_wrapped_module"):
            name = name.replace("self_attn.", f"self_attn.{wrapper}.")
        return name

    for path in sharded.glob("*.safetensors"):
        values = load_file(path)
        save_file({wrapped(name): each for name, each in values.items()}, path)
    index["weight_map"] = {wrapped(k): v for k, v in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
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
    index = json.loads((sharded / INDEX).read_text())
    first, second, *_ = sorted(set(index["weight_map"].values()))
    for name in (first, second):
        values = {**load_file(sharded / name), "model.norm.weight": np.ones(8, "f")}
        save_file(values, sharded / name)
    del index["weight_map"]["model.norm.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
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


def test_load_model_says_that_a_folder_is_no_file(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    assert f"{folder / WEIGHTS} is no file" in refusal(folder)


def test_load_model_survives_long_names_in_an_index(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "x" * 5000 + ".safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    text = refusal(sharded)
    assert "names files that are not there" in text
    assert len(text) < 600


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_])
def test_load_model_refuses_weights_that_are_no_floats(folder, dtype):
    change(folder, model__norm__weight=np.ones(8, dtype))
    assert "model.norm.weight in model.safetensors is" in refusal(folder)


def test_load_model_refuses_an_empty_folder(tmp_path):
    assert "has no config.json" in refusal(tmp_path)
    assert "it is empty" in refusal(tmp_path)


def test_load_model_refuses_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    text = refusal(folder)
    assert "has no config.json" in text
    assert WEIGHTS in text


def test_load_model_refuses_a_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    assert "has no weights: need model.safetensors" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-1.bin", "x.pt"])
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


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a\\b.safetensors", "x.bin", 3, ""]
)
def test_load_model_never_follows_an_index_out_of_the_folder(sharded, file):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    assert "only .safetensors files in the same folder" in refusal(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_load_model_refuses_an_index_without_map(sharded, content):
    (sharded / INDEX).write_text(content)
    assert "has no weight_map" in refusal(sharded)


def test_load_model_refuses_an_index_that_does_not_fit_its_files(sharded):
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    wrong = next(f for f in files if f != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = wrong
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"model.norm.weight is not in {wrong}" in refusal(sharded)


def test_load_model_lists_tensors_of_shards_that_the_index_leaves_out(sharded):
    path = sorted(sharded.glob("*.safetensors"))[0]
    save_file({**load_file(path), "strange": np.zeros(2, np.float32)}, path)
    assert "unexpected: strange" in refusal(sharded)


def test_open_folder_reads_no_weights(folder):
    tensors = open_folder(folder)
    assert tensors.shapes["lm_head.weight"] == (12, 8)
    # What is read is read when it is asked for: a file that is gone shows then.
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="damaged or no safetensors file"):
        tensors.read("lm_head.weight", (slice(0, 1), slice(0, 8)))


@pytest.fixture(scope="module")
def victims(tmp_path_factory, random_params):
    """Two folders that are damaged and mended again, with their sound content."""
    root = tmp_path_factory.mktemp("victims")
    params = random_params(SMALL)
    export_model(root / "whole", SMALL, params)
    export_model(root / "sharded", SMALL, params, max_shard_bytes=1000)
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return [(path, path.read_bytes()) for path in paths]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_load_model_survives_any_damage(victims, data):
    path, sound = data.draw(st.sampled_from(victims))
    kind = data.draw(st.sampled_from(["cut", "flip", "flip", "drop", "add"]))
    # Headers are where damage can be told; the numbers themselves carry no sum.
    at = data.draw(st.integers(0, min(len(sound), 3000) - 1))
    if kind == "cut":
        broken = sound[:at]
    elif kind == "flip":
        value = data.draw(st.integers(1, 255))
        broken = sound[:at] + bytes([sound[at] ^ value]) + sound[at + 1 :]
    elif kind == "drop":
        broken = sound[:at] + sound[at + data.draw(st.integers(1, 9)) :]
    else:
        broken = sound[:at] + data.draw(st.binary(min_size=1, max_size=9)) + sound[at:]
    path.write_bytes(broken)
    try:
        loaded = load_model(path.parent)
    except ModelError:
        pass
    else:
        assert loaded.params["embed"]["embedding"].ndim == 2
    finally:
        path.write_bytes(sound)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
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
