"""Pairs of models: tokenizers that have to agree, and vocabularies that are resized."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from taid_jax.data import DataError
from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params
from taid_jax.models.files.load import export_model, load_model
from taid_jax.models.files.tokenizer import load_tokenizer
from taid_jax.settings import ModelSettings, Settings, SettingsError, from_dict
from taid_jax.sharding import make_mesh
from taid_jax.train.inputs import check_models
from taid_jax.train.on_policy.ends import end_ids
from taid_jax.train.pair import load_pair
from taid_jax.train.resume import identify_models, refuse_other_models

CONFIG = DecoderConfig(
    vocab_size=48,
    d_model=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=8,
    max_position_embeddings=32,
)


def make_tokenizer(tokens, template=None, **options):
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    options = {"eos_token": tokens[0]} | options
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.chat_template = template
    return tokenizer


TOKENS = tuple(chr(0x100 + index) for index in range(40))
OTHERS = (*TOKENS[:20], *(chr(0x400 + index) for index in range(10)))


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory):
    def make(vocab_size, tokens, seed, tokenizer=None, generation=None, **changes):
        folder = tmp_path_factory.mktemp("model") / "folder"
        config = dataclasses.replace(
            CONFIG, vocab_size=vocab_size, padded_vocab_size=0, **changes
        )
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)),
            abstract_params(config),
        )
        tokenizer = tokenizer or make_tokenizer(tokens)
        export_model(folder, config, params, tokenizer, generation=generation)
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
    assert pair.teacher.config.padded_vocab_size == 48
    assert pair.student_config.padded_vocab_size == 44
    assert pair.teacher.config.vocab_size == pair.student_config.vocab_size == 40


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
    assert len(check_models(chosen.model, 8).tokenizer) == 40
    pair = load_pair(chosen, make_mesh("data=1,fsdp=4,tensor=2"))
    for config in (pair.teacher.config, pair.student_config):
        assert config.vocab_size == config.padded_vocab_size == 40
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


@pytest.mark.parametrize("wrong", [40, 10**6, -1])
def test_read_data_refuses_ids_that_the_models_lack(
    monkeypatch, tmp_path, teacher, wrong
):
    """Such as those of prepared data that came with a wrong manifest."""
    from taid_jax.train import inputs

    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(TOKENS[:10]) * 4)
    settings = from_dict({"data": {"data": str(path), "seq_len": 8}})
    tokenizer = load_tokenizer(teacher)
    dataset = inputs.read_data(settings, tokenizer)
    assert dataset.train.table.ids.max() < 40
    dataset.train.table.ids[3] = wrong
    monkeypatch.setattr(inputs, "load_dataset", lambda *_, **__: dataset)
    with pytest.raises(DataError, match=rf"text.txt has the token id {wrong}, .* 39"):
        inputs.read_data(settings, tokenizer)


TEMPLATE = "{% for m in messages %}{{ m['content'] + '" + TOKENS[5] + "' }}{% endfor %}"
BASE = {"eos_token_id": 0, "repetition_penalty": 1.5, "temperature": 1.0}
INSTRUCT = {"eos_token_id": [3, 4], "temperature": 0.25, "do_sample": True}


@pytest.fixture(scope="module")
def base(make_folder):
    return make_folder(48, TOKENS, 1, generation=BASE)


@pytest.fixture(scope="module")
def instruct(make_folder):
    tokenizer = make_tokenizer(
        TOKENS,
        TEMPLATE,
        eos_token=TOKENS[3],
        pad_token=TOKENS[7],
        padding_side="left",
        additional_special_tokens=[TOKENS[5]],
    )
    return make_folder(48, TOKENS, 2, tokenizer=tokenizer, generation=INSTRUCT)


def test_the_settings_of_an_instruct_student_are_its_own(base, instruct):
    chosen = settings(teacher=base, student=instruct)
    tokenizer = check_models(chosen.model, 8).tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token) == (TOKENS[3], TOKENS[7])
    assert (tokenizer.chat_template, tokenizer.padding_side) == (TEMPLATE, "left")
    pair = load_pair(chosen, make_mesh("data=8"))
    said = {key: pair.generation[key] for key in {**BASE, **INSTRUCT}}
    # The teacher's where the student's folder says nothing.
    assert said == {**INSTRUCT, "repetition_penalty": 1.5}
    assert end_ids(tokenizer, pair.generation) == (3, 4, 5)


def test_the_settings_that_a_student_lacks_are_the_teachers(base, instruct):
    chosen = settings(teacher=instruct, student=base)
    tokenizer = check_models(chosen.model, 8).tokenizer
    assert (tokenizer.eos_token, tokenizer.chat_template) == (TOKENS[0], TEMPLATE)
    pair = load_pair(chosen, make_mesh("data=8"))
    assert {**pair.generation} | BASE | {"do_sample": True} == {**pair.generation}
    layers = settings(teacher=instruct, student_layers=1)
    assert load_pair(layers, make_mesh("data=8")).generation["eos_token_id"] == [3, 4]


def test_the_settings_of_a_student_with_the_teachers_tokenizer(
    base, make_folder, caplog
):
    # Id 9 of the student is the teacher's 19, and for 29 the teacher has no token.
    student = make_folder(
        32,
        OTHERS,
        2,
        tokenizer=make_tokenizer(
            (*OTHERS[10:20], *OTHERS[:10], *OTHERS[20:]), TEMPLATE
        ),
        generation={"eos_token_id": [9, 29], "top_k": 4},
    )
    chosen = settings(teacher=base, student=student, resize_embeddings=True)
    tokenizer = check_models(chosen.model, 8).tokenizer
    assert tokenizer.get_vocab() == make_tokenizer(TOKENS).get_vocab()
    assert tokenizer.chat_template == TEMPLATE
    generation = load_pair(chosen, make_mesh("data=8")).generation
    assert (generation["eos_token_id"], generation["top_k"]) == ([19], 4)
    assert "eos_token_id" in caplog.text


def test_load_pair_refuses_what_does_not_fit_together(teacher, tmp_path, monkeypatch):
    values = json.loads((pathlib.Path(teacher) / "config.json").read_text())
    values |= {"hidden_size": 2**20, "num_hidden_layers": 100}
    (tmp_path / "config.json").write_text(json.dumps(values))
    huge = settings(teacher=teacher, student_config=str(tmp_path))
    # Before any weights are read.
    monkeypatch.setattr("taid_jax.models.files.load.load_params", None)
    with pytest.raises(ModelError, match=r"for the teacher, .* for the student; this"):
        load_pair(huge, make_mesh("data=1,fsdp=8,tensor=1"))


def test_load_pair_says_how_the_models_were_read(teacher, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(teacher, folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"strange": 3, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(values))
    asked = {"teacher": teacher, "student": str(folder)}
    with pytest.raises(ModelError, match=r"strange: .*--allow-unknown-keys"):
        check_models(ModelSettings(**asked), 8)
    allowing = settings(**asked, allow_unknown_keys=True)
    check_models(allowing.model, 8)
    pair = load_pair(allowing, make_mesh("data=8"))
    assert not pair.student_config.tie_embeddings
    untied, unknown = pair.notes
    assert untied.startswith("student: tie_word_embeddings is true, and the files")
    assert unknown == "student: 1 unknown settings or tensors left out: strange"


def test_load_pair_takes_a_student_that_was_exported_without_padding(teacher, tmp_path):
    pair = load_pair(settings(teacher=teacher, student_layers=1), make_mesh("data=8"))
    config = pair.student_config
    assert (config.padded_vocab_size, config.vocab_size) == (48, 40)
    export_model(
        tmp_path / "m", pair.student_config, pair.student_params, pair.teacher.tokenizer
    )
    again = settings(teacher=teacher, student=str(tmp_path / "m"))
    check_models(again.model, 8)
    pair = load_pair(again, make_mesh("data=8"))
    assert pair.student_config.padded_vocab_size == 40
    assert pair.student_config.vocab_size == pair.teacher.config.vocab_size == 40


def test_identify_models_is_by_content_wherever_the_files_lie(teacher, tmp_path):
    mesh = make_mesh("data=8")

    def identify(folder, layers=1):
        chosen = settings(teacher=str(folder), student_layers=layers)
        return identify_models(load_pair(chosen, mesh))

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
