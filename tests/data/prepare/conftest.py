"""Sources in UltraChat's schema, and the options to prepare them with."""

import collections
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


@pytest.fixture
def ask():
    """`ask(folder, output)`: options to prepare the folder with."""
    # Imported late: the annotation checks have to be installed first.
    from taid_jax.data.prepare import PrepareOptions

    def make(folder, output, **options):
        values = {"split": "train_sft", "validation_split": "test_sft", "jobs": 1}
        return PrepareOptions(str(folder), str(output), **values | options)

    return make


@pytest.fixture
def conversations():
    """`conversations(dataset, tokenizer, side)`: how often each text is on a side."""

    def count(dataset, tokenizer, side):
        side = getattr(dataset, side)
        numbers = [number for row in side.rows for number in row]
        return collections.Counter(
            tokenizer.decode(side.table[number].ids.tolist()) for number in numbers
        )

    return count


@pytest.fixture
def rendered():
    """`rendered(folder, pattern, tokenizer)`: the same as the template writes files."""

    def count(folder, pattern, tokenizer):
        texts = collections.Counter()
        for path in folder.glob(pattern):
            for line in path.read_text().splitlines():
                messages = json.loads(line)["messages"]
                texts[tokenizer.apply_chat_template(messages, tokenize=False)] += 1
        return texts

    return count


@pytest.fixture
def lines_of():
    """`lines_of(output)`: the records of the report."""
    from taid_jax.data.prepare import REPORT

    def read(output):
        return [json.loads(line) for line in (output / REPORT).read_text().splitlines()]

    return read
