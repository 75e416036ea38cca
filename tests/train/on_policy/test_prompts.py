"""Prompts of files: what is asked, in every format that training reads, and its ids."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from taid_jax.data import DataError
from taid_jax.data.documents import Chat, make_document
from taid_jax.train.on_policy.prompts import (
    Prompt,
    digest,
    encode_prompts,
    read_prompts,
)

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TURNS = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": "A"},
]


def test_read_prompts_reads_what_training_reads(tmp_path):
    path = tmp_path / "a.json"
    shared = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    records = [
        {"conversations": shared},
        {"instruction": "Q", "input": "I", "output": "A"},
        {"messages": TURNS, "tools": [CALL]},
    ]
    path.write_text(json.dumps(records))
    first, second, third = read_prompts(path)
    assert first.completed("B")["messages"][:-1] == TURNS[:1]
    assert second.completed("B") == {"prompt": "Q\n\nI", "completion": "B"}
    assert third.completed("B") == {
        "messages": [*TURNS[:3], {"role": "assistant", "content": "B"}],
        "chat_template_kwargs": {"tools": [CALL]},
    }
    assert third.origin == f"{path}, record 3"
    assert len({digest([one]) for one in (first, second, third)}) == 3


def test_read_prompts_takes_tables(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\n"Two\nlines",x\nOne,y\n')
    asked = [prompt.completed("")["prompt"] for prompt in read_prompts(path)]
    assert asked == ["Two\nlines", "One"]


def test_read_prompts_ends_at_a_record_that_it_cannot_use(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"line 2: `prompt` must be a string"):
        read_prompts(path)
    with pytest.raises(DataError, match="need a file of records"):
        read_prompts(tmp_path / "a.txt")


def test_prompt_completed_says_all_that_the_record_said(tokenizer, tmp_path):
    """What was not trained on is not trained on later; options stay options."""
    turns = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "R"},
    ]
    record = {"messages": turns, "chat_template_kwargs": {"said": "hi"}}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    tokenizer.chat_template = "{{ said }} user"
    [prompt] = read_prompts(path)
    [encoded] = encode_prompts([prompt], tokenizer)
    assert encoded.ids == [3, 4]
    read = make_document(prompt.completed("A"), 0).content
    assert [message.trained for message in read.messages] == [True, False, True, True]
    assert read.options == (("said", "hi"),)


@pytest.fixture
def tokenizer():
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "hi": 3, "user": 4}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def encode(tokenizer, text):
    [found] = encode_prompts([Prompt(0, "here", Chat.pair(text))], tokenizer)
    return found.ids


@pytest.mark.parametrize("text", ["hi", "<s>hi", "<s> hi", "<s><s>hi"])
def test_encode_prompts_begins_with_one_start_token(tokenizer, text):
    assert encode(tokenizer, text) == [0, 3]
    # What begins with it was rendered before, and is no turn of a chat.
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }} user"
    assert encode(tokenizer, text) == ([0, 3, 4] if text == "hi" else [0, 3])


def test_encode_prompts_adds_no_start_token_to_a_template_without(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }} user"
    assert encode(tokenizer, "hi") == [3, 4]
