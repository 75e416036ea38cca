"""Prompts of files: what is asked, in every format that training reads."""

import json

import pytest

from taid_jax.data import DataError
from taid_jax.train.prompts import digest, read_prompts

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
    assert first.messages == (TURNS[0],)
    assert (second.messages, second.text) == (None, "Q\n\nI")
    assert third.messages == tuple(TURNS[:3])
    assert third.options == {"tools": [CALL]}
    assert third.origin == f"{path}, record 3"
    assert len({digest([one]) for one in (first, second, third)}) == 3


def test_read_prompts_takes_tables(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\n"Two\nlines",x\nOne,y\n')
    assert [prompt.text for prompt in read_prompts(path)] == ["Two\nlines", "One"]


def test_read_prompts_ends_at_a_record_that_it_cannot_use(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"line 2: `prompt` must be a string"):
        read_prompts(path)
    with pytest.raises(DataError, match=r"need a \.jsonl or \.parquet file"):
        read_prompts(tmp_path / "a.txt")
