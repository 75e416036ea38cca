"""The front door: any source to a model, on one device or many; random starts."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tokenizers import pre_tokenizers

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import (
    abstract_params,
    param_axes,
)
from taid_jax.models.files.entries import entries
from taid_jax.models.files.hf import open_folder
from taid_jax.models.files.hub import DEFAULT_TEACHER
from taid_jax.models.files.load import (
    export_model,
    load_config,
    load_model,
    random_init,
)
from taid_jax.models.files.tokenizer import load_tokenizer
from taid_jax.models.files.weights import load_params
from taid_jax.sharding import make_mesh, tree_shardings

CONFIG = DecoderConfig(
    vocab_size=40,
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=12,
    max_position_embeddings=64,
)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_params):
    path = tmp_path_factory.mktemp("load") / "model"
    export_model(path, CONFIG, random_params(CONFIG), generation={"top_k": 5})
    return path


def sharded_like_training(mesh):
    """Returns a function from a config to the shardings that training uses."""

    def make(config):
        return tree_shardings(param_axes(config), abstract_params(config), mesh)

    return make


def test_load_model_returns_config_weights_and_generation(folder, random_params):
    loaded = load_model(str(folder))
    assert loaded.config == CONFIG == load_config(folder)
    assert loaded.source == str(folder)
    assert loaded.tokenizer is None
    assert loaded.generation["top_k"] == 5
    same(loaded.params, random_params(CONFIG))


def test_load_model_returns_what_a_gguf_file_says_of_generation(tmp_path, write_gguf):
    def one_end(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([chr(0x100 + number) for number in range(40)])
        writer.add_token_merges([])
        writer.add_eos_token_id(3)

    def two_ends(writer):
        one_end(writer)
        writer.add_eot_token_id(5)

    drawn = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    write_gguf(tmp_path / "m.gguf", tokens=two_ends, keys=drawn)
    assert load_model(tmp_path / "m.gguf").generation == {
        "eos_token_id": [3, 5],
        "temperature": 0.5,
        "top_k": 20,
        "do_sample": True,
    }
    # The tokenizer's own end says it all.
    write_gguf(tmp_path / "one.gguf", tokens=one_end)
    assert load_model(tmp_path / "one.gguf").generation == {}


def test_load_model_takes_the_ends_of_an_older_folder_from_its_config(folder, tmp_path):
    older = shutil.copytree(folder, tmp_path / "older")
    (older / "generation_config.json").unlink()
    values = json.loads((older / "config.json").read_text())
    (older / "config.json").write_text(json.dumps(values | {"eos_token_id": [7, 9]}))
    assert load_model(older).generation == {"eos_token_id": [7, 9]}


def test_load_model_leaves_arrays_free_to_move(folder):
    # Beside arrays that are spread over a mesh, committed ones would be refused.
    mesh = Mesh(np.array(jax.devices()), ("x",))
    spread = jax.device_put(jnp.ones(40), NamedSharding(mesh, PartitionSpec("x")))
    embedding = load_model(folder).params["embed"]["embedding"]
    assert jax.jit(lambda a, b: a @ b)(spread, embedding).shape == (16,)


@pytest.mark.multidevice
def test_load_model_takes_one_sharding_or_a_tree(folder):
    device = SingleDeviceSharding(jax.devices()[3])
    placed = load_model(folder, shardings=device).params
    assert {leaf.sharding for leaf in jax.tree.leaves(placed)} == {device}
    tree = jax.tree.map(lambda leaf: device, placed)
    same(load_model(folder, shardings=tree).params, placed)


@pytest.mark.multidevice
def test_load_params_reads_each_part_once_and_no_more(folder):
    asked = []

    class Watched:
        """Tensors that write down what is read of them."""

        file_format = "hf"

        def __init__(self, inner):
            self.origin, self.shapes, self.inner = inner.origin, inner.shapes, inner

        def read(self, name, index):
            part = self.inner.read(name, index)
            asked.append((name, part.size))
            return part

    tensors = Watched(open_folder(folder))
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    make = sharded_like_training(mesh)
    load_params(CONFIG, tensors, dtype="float32", shardings=make)
    read = {}
    for name, size in asked:
        read.setdefault(name, []).append(size)
    shardings = make(CONFIG)
    for entry in entries(CONFIG, "hf"):
        node = shardings
        for key in entry.path:
            node = node[key]
        parts = set(map(str, node.devices_indices_map(entry.shape).values()))
        for (name,) in entry.names:
            # Copies of a part are read once; together the parts are the tensor.
            assert len(read[name]) == len(parts), name
            assert sum(read[name]) == np.prod(tensors.shapes[name]), name


@pytest.mark.multidevice
def test_random_init_needs_no_weights_and_creates_them_where_they_belong(
    tmp_path, golden_teacher
):
    path = tmp_path / "config.json"
    path.write_text((golden_teacher / "config.json").read_text())
    make = sharded_like_training(make_mesh("fsdp=8"))
    model = random_init(path, jax.random.key(0), shardings=make)
    assert model.config == load_config(golden_teacher)
    kernel = model.params["layers"]["mlp"]["up_proj"]["kernel"]
    # 73,728 draws: the spread is within 1% of the config's with near certainty.
    np.testing.assert_allclose(kernel.std(), 0.25, rtol=0.02)
    embedding = model.params["embed"]["embedding"]
    assert embedding.sharding.shard_shape(embedding.shape) == (512, 96 // 8)
    # The same numbers on one device, rounded.
    narrow = random_init(tmp_path, jax.random.key(0), dtype="bfloat16").params
    same(narrow, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model.params))


def test_load_model_never_makes_weights_up(tmp_path, golden_teacher):
    (tmp_path / "config.json").write_text((golden_teacher / "config.json").read_text())
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ModelError, match="has no weights"):
            load_model(source)


def test_export_model_expands_the_home_folder(tmp_path, monkeypatch, random_params):
    monkeypatch.setenv("HOME", str(tmp_path))
    export_model("~/model", CONFIG, random_params(CONFIG))
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.slow
def test_importing_the_front_door_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import taid_jax.models.files.load, taid_jax.models.files.tokenizer\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.fixture(scope="module")
def teacher():
    return load_model(DEFAULT_TEACHER)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, teacher):
    path = tmp_path_factory.mktemp("smollm2") / "model"
    export_model(path, teacher.config, teacher.params, teacher.tokenizer)
    return path


@pytest.mark.real_model
def test_smollm2_has_the_published_sizes(teacher):
    assert sum(leaf.size for leaf in jax.tree.leaves(teacher.params)) == 134_515_008
    config = teacher.config
    assert (config.num_layers, config.d_model, config.mlp_dim) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert (config.rope.theta, config.norm_eps) == (1e5, 1e-5)
    assert config.tie_embeddings


@pytest.mark.real_model
def test_smollm2_exported_and_read_again_is_the_same(teacher, exported):
    again = load_model(exported)
    assert again.config == teacher.config
    same(again.params, teacher.params)


@pytest.mark.real_model
def test_smollm2_tokenizer_gives_the_ids_of_transformers(varied_strings, exported):
    pytest.importorskip("torch", reason="transformers reads GGUF with PyTorch only")
    transformers = pytest.importorskip("transformers")
    from taid_jax.models.files.hub import resolve

    path = resolve(DEFAULT_TEACHER).path
    theirs = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name
    )
    # From GGUF, transformers cuts as GPT-2 does; the model's own tokenizer.json sets
    # every digit apart before.
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    messages = [{"role": "user", "content": "Hi"}]
    for source in (DEFAULT_TEACHER, exported):
        ours = load_tokenizer(source)
        for text in varied_strings:
            assert ours(text)["input_ids"] == theirs(text)["input_ids"], repr(text)
        assert ours.get_vocab() == theirs.get_vocab()
        assert ours.apply_chat_template(messages, tokenize=False) == (
            theirs.apply_chat_template(messages, tokenize=False)
        )
