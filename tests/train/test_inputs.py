"""Pairs of models: tokenizers that have to agree, and vocabularies that are resized."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import init_params
from taid_jax.models.errors import ModelError
from taid_jax.models.load import export_model, load_model
from taid_jax.settings import ModelSettings, Settings, SettingsError
from taid_jax.sharding import make_mesh
from taid_jax.train.inputs import (
    check_models,
    identify_models,
    load_pair,
    refuse_other_models,
)

CONFIG = DecoderConfig(
    vocab_size=48,
    d_model=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=8,
    max_length=32,
)


def make_tokenizer(tokens):
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[0])


TOKENS = tuple(chr(0x100 + index) for index in range(40))
OTHERS = (*TOKENS[:20], *(chr(0x400 + index) for index in range(10)))


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory):
    def make(vocab_size, tokens, seed, **changes):
        folder = tmp_path_factory.mktemp("model") / "folder"
        config = dataclasses.replace(CONFIG, vocab_size=vocab_size, **changes)
        params = init_params(config, jax.random.key(seed))
        export_model(folder, config, params, make_tokenizer(tokens))
        return str(folder)

    return make


@pytest.fixture(scope="module")
def teacher(make_folder):
    return make_folder(48, TOKENS, 1)


@pytest.fixture(scope="module")
def stranger(make_folder):
    """A student with another tokenizer and a smaller vocabulary."""
    return make_folder(32, OTHERS, 2, tie_embeddings=True)


def settings(**values):
    return Settings(model=ModelSettings(**values))


def test_check_models_takes_another_padding_of_the_same_tokenizer(teacher, make_folder):
    student = make_folder(44, TOKENS, 2)
    check_models(ModelSettings(teacher=teacher, student=student), 8)
    pair = load_pair(settings(teacher=teacher, student=student), make_mesh("data=8"))
    assert pair.teacher.config.vocab_size == 48
    assert pair.student_config.vocab_size == 44
    assert pair.teacher.config.num_tokens == pair.student_config.num_tokens == 40


def test_check_models_refuses_another_tokenizer_and_names_the_way_out(
    teacher, stranger
):
    with pytest.raises(ModelError, match=r"differ in 20 ids.*--resize-embeddings"):
        check_models(ModelSettings(teacher=teacher, student=stranger), 8)


def test_check_models_refuses_a_tokenizer_that_differs_in_one_id(teacher, make_folder):
    student = make_folder(48, (*TOKENS, "Z"), 2)
    with pytest.raises(ModelError, match=r"differ in 1 ids: 40 is None and 'Z'"):
        check_models(ModelSettings(teacher=teacher, student=student), 8)


def test_check_models_refuses_ids_without_an_embedding(teacher, make_folder):
    student = make_folder(36, TOKENS, 2)
    with pytest.raises(ModelError, match=r"36 embeddings, and its tokenizer ids up to"):
        check_models(ModelSettings(teacher=teacher, student=student), 8)


@pytest.mark.multidevice
def test_load_pair_resizes_both_models_to_the_teachers_tokenizer(teacher, stranger):
    chosen = settings(teacher=teacher, student=stranger, resize_embeddings=True)
    assert len(check_models(chosen.model, 8)) == 40
    pair = load_pair(chosen, make_mesh("data=1,fsdp=4,tensor=2"))
    for config in (pair.teacher.config, pair.student_config):
        assert (config.vocab_size, config.num_tokens) == (40, None)
    before = load_model(stranger).params["embed"]["embedding"]
    after = np.asarray(pair.student_params["embed"]["embedding"])
    np.testing.assert_array_equal(after[:32], before)
    # A mean of 32 float32 numbers, added up in another order.
    np.testing.assert_allclose(after[39], before.mean(axis=0), rtol=1e-4, atol=1e-7)
    whole = load_model(teacher).params["lm_head"]["kernel"]
    np.testing.assert_array_equal(
        pair.teacher.params["lm_head"]["kernel"], whole[:, :40]
    )


def test_load_pair_resizes_layers_of_the_teacher_like_the_teacher(teacher):
    chosen = settings(teacher=teacher, student_layers=1, resize_embeddings=True)
    pair = load_pair(chosen, make_mesh("data=8"))
    assert pair.student_config.vocab_size == pair.teacher.config.vocab_size == 40
    np.testing.assert_array_equal(
        pair.student_params["embed"]["embedding"],
        pair.teacher.params["embed"]["embedding"],
    )


def test_identify_models_is_by_content_wherever_the_files_lie(teacher, tmp_path):
    mesh = make_mesh("data=8")

    def identify(folder, layers=1):
        chosen = settings(teacher=str(folder), student_layers=layers)
        return identify_models(chosen.model, load_pair(chosen, mesh))

    known = identify(teacher)
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    (moved / "README.md").write_text("Another file.")
    refuse_other_models(known, identify(moved))
    # One number, somewhere in the middle.
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(SettingsError, match="that the run began with: the teacher's w"):
        refuse_other_models(known, identify(moved))
    with pytest.raises(SettingsError, match="the student's num_layers differ"):
        refuse_other_models(known, identify(teacher, layers=2))
    # Of a checkpoint by a version that wrote down less, or more.
    refuse_other_models({}, known)
    refuse_other_models(known | {"the student's colour": "blue"}, known)
