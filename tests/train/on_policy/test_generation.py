import copy
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from taid_jax.data import DataError, load_dataset
from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params, init_params
from taid_jax.models.files.load import export_model
from taid_jax.models.generation import generate
from taid_jax.settings import SettingsError
from taid_jax.sharding import make_mesh, replicated
from taid_jax.train.completions import EvalCompletions
from taid_jax.train.on_policy import ends as text_ends
from taid_jax.train.on_policy.prompts import EvalPrompt, find_eval_prompts

WORDS = [f"w{number}" for number in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {"<end>": 0, "<turn>": 1, "<unk>": 2}
    vocab |= {word: number for number, word in enumerate(WORDS, start=3)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<turn>"],
    )


@pytest.fixture
def dataset(tokenizer, tmp_path):
    """Twenty questions of different lengths; each answer is its question's first."""

    def make(pack=False, train_on_prompts=True, texts=0):
        path = tmp_path / "questions.jsonl"
        records = [
            {
                "prompt": " ".join(WORDS[i % 9 : i % 9 + 2 + i % 5]) + f" w{i}",
                "completion": f" {WORDS[i % 9]} w{i}",
            }
            for i in range(20)
        ]
        records += [{"text": f"w{i} w{i + 1} w3"} for i in range(texts)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_dataset(
            str(path),
            tokenizer,
            seq_len=16,
            held_out_fraction=0.5,
            train_on_prompts=train_on_prompts,
            pack=pack,
        )

    return make


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig(
        vocab_size=len(WORDS) + 3,
        d_model=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=32,
        max_position_embeddings=48,
        initializer_range=0.5,
    )
    return config, init_params(config, jax.random.key(0))


def _prepared(questions, tokenizer, model, **changes):
    mesh = make_mesh("data=1,fsdp=-1")
    options = {
        "max_new_tokens": 5,
        "batch_size": 8,
        "dtype": "float32",
        "mesh": mesh,
        "shardings": jax.tree.map(lambda _: replicated(mesh), model[1]),
    }
    return EvalCompletions(questions, tokenizer, model[0], {}, **(options | changes))


@pytest.mark.parametrize(("pack", "train_on_prompts"), [(True, False), (False, True)])
def test_find_eval_prompts_parts_prompt_and_answer(
    dataset, tokenizer, pack, train_on_prompts
):
    found = find_eval_prompts(dataset(pack, train_on_prompts).held_out, 100)
    assert found
    for question in found:
        prompt = tokenizer.decode(question.prompt.tolist()).split()
        answer = tokenizer.decode(question.reference.tolist()).split()
        # What the fixture wrote: the answer repeats the prompt's first word and last.
        assert answer == [prompt[0], prompt[-1], "<end>"]


def test_find_eval_prompts_limit_and_order(dataset):
    held_out = dataset().held_out
    every = find_eval_prompts(held_out, 100)
    few = find_eval_prompts(held_out, 3)
    assert len(few) == 3
    for a, b in zip(few, every, strict=False):
        np.testing.assert_array_equal(a.prompt, b.prompt)
    assert find_eval_prompts(held_out, 0) == []


def test_find_eval_prompts_running_text_is_asked_to_be_gone_on_with(dataset):
    found = find_eval_prompts(dataset(texts=20).held_out, 100)
    halves = [question for question in found if len(question.reference) == 2]
    assert halves
    # "w0 w1 w3" and the end: two tokens each.
    assert all(question.reference.tolist() == [6, 0] for question in halves)


def test_find_eval_prompts_none_is_an_error(dataset):
    held_out = dataset().held_out
    zeros = np.zeros_like(held_out.table.prompts)
    table = dataclasses.replace(held_out.table, prompts=zeros, answer_ends=zeros)
    held_out = dataclasses.replace(held_out, table=table)
    with pytest.raises(DataError, match=r"no held-out example has a prompt.*0"):
        find_eval_prompts(held_out, 4)


def test_end_ids_of_tokenizer_model_and_template(tokenizer):
    def asked(last):
        return EvalPrompt(np.array([4, 5], np.int32), np.array([6, last], np.int32))

    assert text_ends.end_ids(tokenizer, {}) == (0,)
    assert text_ends.end_ids(tokenizer, {"eos_token_id": 7}) == (0, 7)
    assert text_ends.end_ids(tokenizer, {"eos_token_id": [7, 9]}) == (0, 7, 9)
    # What a template ends a turn with, but no word.
    assert text_ends.end_ids(tokenizer, {}, [asked(1), asked(12)]) == (0, 1)


def test_end_ids_of_running_text_is_not_where_it_was_cut(tokenizer):
    questions = [
        EvalPrompt(np.array([4], np.int32), np.array([5, last], np.int32))
        for last in (1, 4, 7)
    ]
    assert text_ends.end_ids(tokenizer, {}, questions) == (0,)
    # Nor an id that there is no token for.
    assert text_ends.end_ids(tokenizer, {"eos_token_id": [0, 99, -1]}) == (0,)


@pytest.fixture
def chatty(tokenizer):
    """The tokenizer of a base model, with a template that ends turns by its own."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    return chatty


@pytest.mark.parametrize("kept", [{}, {"eos_token_id": [2, 0], "top_k": 3}])
def test_export_generation_stops_transformers_where_training_ended(
    chatty, dataset, tmp_path, kept, caplog
):
    torch = pytest.importorskip("torch", reason="PyTorch runs the exported student")
    data = dataset()
    generation = text_ends.export_generation(kept, chatty, data)
    assert generation == {**kept, "eos_token_id": [0, 1, 2] if kept else [0, 1]}
    assert not caplog.records
    config = DecoderConfig(
        vocab_size=len(WORDS) + 3,
        d_model=4,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        mlp_dim=4,
        max_position_embeddings=48,
    )
    # Always says <turn>, its end of an answer.
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), abstract_params(config))
    params["embed"]["embedding"][:] = params["final_norm"]["scale"][:] = 1
    params["lm_head"]["kernel"][:, 1] = 1
    params = jax.tree.map(jnp.float32, params)
    export_model(tmp_path / "student", config, params, chatty, generation=generation)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    answer = student.generate(torch.tensor([[5, 6]]), max_new_tokens=7, do_sample=False)
    assert answer.tolist() == [[5, 6, 1]]
    assert student.config.eos_token_id == generation["eos_token_id"]


@pytest.mark.parametrize(
    ("end", "said"),
    [(" w7 end\\n", r"by 'w7 end', which is no token"), ("", "writes nothing")],
)
def test_export_generation_warns_of_an_end_that_is_no_token(
    chatty, dataset, end, said, caplog
):
    chatty.chat_template = chatty.chat_template.replace(" <turn>\\n", end)
    generation = text_ends.export_generation({"top_k": 3}, chatty, dataset())
    assert generation == {"top_k": 3, "eos_token_id": 0}
    assert re.search(said, caplog.text)


def test_template_end_is_what_follows_the_answer_and_not_its_header(chatty):
    chatty.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "bot: {{ m['content'] }} <turn>{% endgeneration %}{% else %}"
        "user: {{ m['content'] }} {% endif %}{% endfor %}"
    )
    assert text_ends.template_end(chatty) == text_ends.TemplateEnd(" <turn>", 1)


def test_export_generation_of_an_end_behind_a_line_end(chatty, dataset, caplog):
    chatty.chat_template = chatty.chat_template.replace(" <turn>\\n", "\\n<end>")
    assert text_ends.export_generation({}, chatty, dataset()) == {"eos_token_id": 0}
    assert not caplog.records


def test_decode_stops_before_the_end(tokenizer):
    ids = np.array([3, 4, 0, 5], np.int32)
    assert text_ends.decode(tokenizer, ids, (0,)) == "w0 w1"
    assert text_ends.decode(tokenizer, ids[:2], (0,)) == "w0 w1"
    assert text_ends.decode(tokenizer, np.array([0], np.int32), (0,)) == ""


def test_completions_are_those_of_each_prompt_alone(dataset, tokenizer, model):
    config, params = model
    questions = find_eval_prompts(dataset().held_out, 100)
    assert len(questions) % 8  # The last batch is filled up.
    completions = _prepared(questions, tokenizer, model)
    found = completions(params)
    assert len(found) == len(questions)
    # One of each batch, of one length: every length compiles the check anew.
    lengths = [len(question.prompt) for question in questions]
    last = len(questions) - 1
    for index in (lengths.index(lengths[last]), last):
        question, answer = questions[index], found[index]
        tokens = generate(
            params,
            config,
            jnp.asarray(question.prompt)[None],
            jnp.ones((1, len(question.prompt)), jnp.int32),
            max_new_tokens=5,
            eos_token_ids=(0,),
            pad_token_id=0,
        ).tokens
        assert answer == text_ends.decode(tokenizer, np.asarray(tokens[0]), (0,))
    assert len(set(found)) > 1
    assert completions.references == [
        text_ends.decode(tokenizer, question.reference, (0,)) for question in questions
    ]


def test_completions_repeat_and_leave_the_parameters(dataset, tokenizer, model):
    _, params = model
    before = jax.tree.map(np.array, params)
    questions = find_eval_prompts(dataset().held_out, 3)
    completions = _prepared(questions, tokenizer, model)
    assert completions(params) == completions(params)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_completions_leave_out_prompts_without_room(dataset, tokenizer, model):
    questions = find_eval_prompts(dataset().held_out, 100)
    lengths = sorted(len(question.prompt) for question in questions)
    room = model[0].max_position_embeddings - lengths[-1] + 1
    kept = _prepared(questions, tokenizer, model, max_new_tokens=room).prompts
    assert 0 < len(kept) < len(questions)
    with pytest.raises(SettingsError, match="context of 48"):
        _prepared(questions, tokenizer, model, max_new_tokens=47)


def test_completions_of_a_student_that_is_no_number_are_an_error(
    dataset, tokenizer, model
):
    _, params = model
    questions = find_eval_prompts(dataset().held_out, 100)
    completions = _prepared(questions, tokenizer, model)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(ModelError, match=r"logits are not finite .* 8 of 8"):
        completions(broken)
