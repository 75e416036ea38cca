"""Sources in UltraChat's schema, and the options to prepare them with."""

import json

import pytest


@pytest.fixture
def ultrachat(make_conversations):
    """`ultrachat(count, seed)`: records with the keys of HuggingFaceH4/ultrachat_200k.

    The shortest conversations have 2 turns, the longest 8; all open with the user.
    """

    def make(count, *, seed=0):
        records = []
        for number, messages in enumerate(make_conversations(count, seed=seed)):
            turns = [m for m in messages if m["role"] != "system"]
            prompt = turns[0]["content"]
            name = f"{seed:04}{number:060x}"
            records.append({"prompt": prompt, "prompt_id": name, "messages": turns})
        return records

    return make


@pytest.fixture
def folder(tmp_path, ultrachat):
    """A copy of the data set's folder: two splits, and one that nobody asks for."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, count, seed in [
        ("train_sft-00000", 60, 1),
        ("train_sft-00001", 40, 2),
        ("test_sft-00000", 20, 3),
        ("train_gen-00000", 10, 4),
    ]:
        records = ultrachat(count, seed=seed)
        lines = [json.dumps(record) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
