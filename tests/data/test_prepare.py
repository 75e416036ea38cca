"""From raw conversations to shards: nothing lost or doubled, and why others are not."""

import collections
import dataclasses
import json
import os
import pathlib
import random
import re

import numpy as np
import pytest

from taid_jax.data import DataError, load_dataset, rows
from taid_jax.data import prepare as module
from taid_jax.data.errors import REASONS
from taid_jax.data.prepare import PRESETS, REPORT, PrepareOptions, prepare
from taid_jax.data.shards import read_manifest


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

    def read(output):
        return [json.loads(line) for line in (output / REPORT).read_text().splitlines()]

    return read


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def test_prepare_keeps_every_conversation_on_its_side(
    folder, tmp_path, tokenizer, ask, conversations, rendered
):
    manifest = prepare(ask(folder, tmp_path / "out"), tokenizer)
    assert manifest.records == 120
    assert manifest.left_out == {}
    dataset = load_dataset(tmp_path / "out", tokenizer, seq_len=2048)
    for side, pattern in [("train", "train_sft*"), ("held_out", "test_sft*")]:
        found = conversations(dataset, tokenizer, side)
        assert found == rendered(folder, pattern, tokenizer)
    assert dataset.info.train.examples == 100
    assert sum(f.examples for f in manifest.files if f.side == "validation") == 20
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        REPORT,
        *(file.name for file in manifest.files),
    }


@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_prepare_gives_what_reading_the_files_gives(
    tokenizers, folder, tmp_path, train_on_prompts, ask
):
    """The same tokens, the same counted ones, the same last answers; other order."""
    options = {"seq_len": 2048, "train_on_prompts": train_on_prompts}
    tokenizer = tokenizers["phi3"]
    source = [folder / f"train_sft-0000{n}.jsonl" for n in (0, 1)]
    raw = load_dataset(source, tokenizer, held_out_fraction=0.0, **options)
    asked = ask(folder, tmp_path / "out", train_on_prompts=train_on_prompts)
    prepare(asked, tokenizer)
    shards = load_dataset(tmp_path / "out", tokenizer, **options)

    def examples(dataset):
        table, rows = dataset.train.table, dataset.train.rows
        numbers = [number for row in rows for number in row]
        return sorted(
            (ids.tolist(), counted.tolist(), prompt, end)
            for ids, counted, prompt, end in map(table.__getitem__, numbers)
        )

    assert examples(shards) == examples(raw)


def test_prepare_shuffles(folder, tmp_path, tokenizer, ask, conversations, rendered):
    def order(name, **options):
        prepare(ask(folder, tmp_path / name, **options), tokenizer)
        dataset = load_dataset(tmp_path / name, tokenizer, seq_len=2048, pack=False)
        return list(conversations(dataset, tokenizer, "train"))

    first, other = order("a"), order("b", seed=1)
    assert sorted(first) == sorted(other)
    assert first != other
    assert list(rendered(folder, "train_sft*", tokenizer)) not in (first, other)


@pytest.mark.slow
def test_prepare_gives_the_same_bytes_however_it_is_shared_out(
    folder, tmp_path, tokenizer, ask
):
    options = {"shard_tokens": 2000}
    prepare(ask(folder, tmp_path / "one", **options), tokenizer)
    prepare(ask(folder, tmp_path / "two", **options, jobs=2), tokenizer)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    assert sum(name.startswith("train-") for name in one) > 3
    # Of about the size that was asked for.
    sizes = [f.tokens for f in read_manifest(tmp_path / "one").files[:-1]]
    assert max(sizes) < 2000 * 1.5
    assert min(sizes) > 2000 / 2


def test_prepare_gives_the_same_examples_in_any_shards(
    folder, tmp_path, tokenizer, ask
):
    """The order of the shuffle does not hang on pieces and shards either."""
    orders = []
    for name, options in [
        ("small", {"shard_tokens": 1500}),
        ("large", {}),
    ]:
        prepare(ask(folder, tmp_path / name, **options), tokenizer)
        table = load_dataset(tmp_path / name, tokenizer, seq_len=2048).train.table
        orders.append(table)
    np.testing.assert_array_equal(orders[0].ids, orders[1].ids)
    np.testing.assert_array_equal(orders[0].starts, orders[1].starts)


class Killed(BaseException):
    """As if the process had gone."""


@pytest.mark.parametrize("seed", range(2))
def test_prepare_goes_on_after_being_killed(
    folder, tmp_path, tokenizer, monkeypatch, seed, ask
):
    """Killed at some writes, whole or with half a file left behind."""
    options = {"shard_tokens": 3000}
    prepare(ask(folder, tmp_path / "whole", **options), tokenizer)
    draw = random.Random(seed)
    replace, rows_of = pathlib.Path.replace, rows._rows_of
    left = 0

    def count():
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    def dies_encoding(*arguments):
        count()
        return rows_of(*arguments)

    def dies_writing(path, target):
        try:
            count()
        except Killed:
            path.write_bytes(path.read_bytes()[: draw.randint(0, 50)])
            raise
        return replace(path, target)

    killed = 0
    with monkeypatch.context() as patch:
        patch.setattr(rows, "PIECE", 30)
        patch.setattr(pathlib.Path, "replace", dies_writing)
        patch.setattr(rows, "_rows_of", dies_encoding)
        for _ in range(100):
            left = draw.randint(1, 50)
            try:
                prepare(ask(folder, tmp_path / "killed", **options), tokenizer)
                break
            except Killed:
                killed += 1
                with pytest.raises(DataError):  # unfinished data are not read
                    load_dataset(tmp_path / "killed", tokenizer, seq_len=2048)
    assert killed > 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_prepare_does_not_encode_finished_pieces_again(
    folder, tmp_path, tokenizer, monkeypatch, ask
):
    options = ask(folder, tmp_path / "out")
    monkeypatch.setattr(module, "choose", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(options, tokenizer)
    monkeypatch.undo()
    monkeypatch.setattr(rows._Encode, "__call__", None)  # not to be called
    assert prepare(options, tokenizer).records == 120


def test_prepare_is_done_when_it_is_done(folder, tmp_path, tokenizer, monkeypatch, ask):
    options = ask(folder, tmp_path / "out")
    manifest = prepare(options, tokenizer)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(module, "find_source", None)  # not to be called
    assert prepare(options, tokenizer) == manifest
    assert contents(tmp_path / "out") == before


def test_prepare_refuses_a_folder_with_something_else(folder, tmp_path, tokenizer, ask):
    output = tmp_path / "out"
    prepare(ask(folder, output), tokenizer)
    before = contents(output)
    with pytest.raises(DataError, match=r"options\.max_tokens was 2048, now 100"):
        prepare(ask(folder, output, max_tokens=100), tokenizer)
    assert contents(output) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("a")
    with pytest.raises(DataError, match="is not empty"):
        prepare(ask(folder, tmp_path / "other"), tokenizer)
    with pytest.raises(DataError, match="is not a folder"):
        prepare(ask(folder, tmp_path / "other" / "precious.txt"), tokenizer)


def test_prepare_refuses_to_go_on_with_something_else(
    folder, tmp_path, tokenizer, monkeypatch, ask
):
    options = ask(folder, tmp_path / "out")
    monkeypatch.setattr(module, "choose", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(options, tokenizer)
    with pytest.raises(DataError, match=r"begun otherwise.*seed was 0, now 1"):
        prepare(ask(folder, tmp_path / "out", seed=1), tokenizer)
    path = folder / "train_sft-00000.jsonl"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match="files of the source have changed"):
        prepare(options, tokenizer)


def test_ultrachat_preset_is_the_published_recipe():
    options = PrepareOptions(output="out", **PRESETS["ultrachat"])
    assert options.data == "HuggingFaceH4/ultrachat_200k"
    assert (options.split, options.validation_split) == ("train_sft", "test_sft")
    limits = (options.max_tokens, options.max_prompt, options.max_answer)
    assert limits == (2048, 1536, 512)
    assert options.validation_limit == 2000
    assert options.train_on_prompts


def test_ultrachat_preset_prepares_a_copy_of_the_folder(folder, tmp_path, tokenizer):
    preset = {**PRESETS["ultrachat"], "data": str(folder)}
    manifest = prepare(
        PrepareOptions(output=str(tmp_path / "out"), jobs=1, **preset), tokenizer
    )
    assert manifest.train_on_prompts
    assert manifest.records == 120
    with pytest.raises(DataError, match="prepared with --train-on-prompts"):
        load_dataset(tmp_path / "out", tokenizer, seq_len=2048)
    info = load_dataset(
        tmp_path / "out", tokenizer, seq_len=2048, train_on_prompts=True
    ).info
    assert info.train.counted_tokens == info.train.tokens - info.train.examples


def test_prepare_limits_conversations_and_says_why(
    folder, tmp_path, tokenizer, ask, lines_of
):
    whole = prepare(ask(folder, tmp_path / "whole"), tokenizer)
    limits = {"max_tokens": 240, "max_prompt": 200, "max_answer": 25}
    manifest = prepare(ask(folder, tmp_path / "out", **limits), tokenizer)
    assert set(manifest.left_out) == {"too_long", "prompt_too_long", "answer_too_long"}
    kept = sum(file.examples for file in manifest.files)
    assert kept + sum(manifest.left_out.values()) == whole.records == 120
    table = load_dataset(tmp_path / "out", tokenizer, seq_len=2048).train.table
    for number in range(len(table)):
        ids, _, prompt, end = table[number]
        assert len(ids) <= 240
        assert prompt <= 200
        assert end - prompt <= 25
    reasons = collections.Counter(line["reason"] for line in lines_of(tmp_path / "out"))
    assert reasons == manifest.left_out


def test_prepare_validates_on_so_many(
    folder, tmp_path, tokenizer, ask, conversations, rendered
):
    manifest = prepare(ask(folder, tmp_path / "out", validation_limit=5), tokenizer)
    assert manifest.left_out == {"beyond_limit": 15}
    dataset = load_dataset(tmp_path / "out", tokenizer, seq_len=2048)
    found = conversations(dataset, tokenizer, "held_out")
    assert found.total() == 5
    assert not found - rendered(folder, "test_sft*", tokenizer)
    assert dataset.info.train.examples == 100


def test_prepare_holds_out_by_prompts_without_a_validation_source(
    folder, tmp_path, tokenizer, ask, conversations
):
    asked = ask(folder, tmp_path / "out", validation_split=None, held_out_fraction=0.2)
    manifest = prepare(asked, tokenizer)
    assert manifest.noted == {}
    raw = load_dataset(
        [folder / f"train_sft-0000{n}.jsonl" for n in (0, 1)],
        tokenizer,
        seq_len=2048,
        held_out_fraction=0.2,
    )
    shards = load_dataset(tmp_path / "out", tokenizer, seq_len=2048)
    for side in ("train", "held_out"):
        ours, theirs = (conversations(d, tokenizer, side) for d in (shards, raw))
        assert ours == theirs


def test_prepare_takes_validation_data_from_elsewhere(folder, tmp_path, tokenizer, ask):
    asked = ask(
        folder / "train_sft-00000.jsonl",
        tmp_path / "out",
        split=None,
        validation_split=None,
        validation_data=str(folder / "test_sft-00000.jsonl"),
    )
    manifest = prepare(asked, tokenizer)
    assert [source["side"] for source in manifest.sources] == ["train", "validation"]
    assert manifest.records == 80
    with pytest.raises(DataError, match="both trained and validated on"):
        prepare(
            ask(
                folder,
                tmp_path / "other",
                validation_split=None,
                validation_data=str(folder),
                split=None,
            ),
            tokenizer,
        )


def test_prepare_drops_copies_and_keeps_other_answers_to_a_prompt(
    folder, tmp_path, tokenizer, ask, lines_of
):
    path = folder / "train_sft-00001.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    changed = json.loads(json.dumps(records[4]))
    changed["messages"][-1]["content"] = "Another answer."
    first = json.loads((folder / "test_sft-00000.jsonl").read_text().splitlines()[0])
    leaked = {**records[7], "prompt_id": "leaked", "messages": first["messages"]}
    records = [*records, records[2], changed, records[2], leaked]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    manifest = prepare(ask(folder, tmp_path / "out"), tokenizer)
    assert manifest.left_out == {"copy": 2}
    assert manifest.noted == {"same_name": 1, "prompt_on_both_sides": 1}
    train = load_dataset(tmp_path / "out", tokenizer, seq_len=2048).info.train
    assert train.examples == 102
    places = {
        (line["reason"], line["origin"].rpartition("/")[2])
        for line in lines_of(tmp_path / "out")
    }
    assert places == {
        ("copy", "train_sft-00001.jsonl, line 41"),
        ("same_name", "train_sft-00001.jsonl, line 42"),
        ("copy", "train_sft-00001.jsonl, line 43"),
        ("prompt_on_both_sides", "test_sft-00000.jsonl, line 1"),
    }


BAD_LINES = {
    "starts_with_assistant": [("assistant", "So."), ("user", "Why?")],
    "empty_turn": [("user", "Why?"), ("assistant", " \n")],
    "unknown_role": [("user", "Why?"), ("narrator", "He said"), ("assistant", "So.")],
    "no_answer": [("user", "Why?")],
}


def bad_lines():
    lines = {
        reason: json.dumps(
            {"messages": [{"role": role, "content": text} for role, text in turns]}
        ).encode()
        for reason, turns in BAD_LINES.items()
    }
    return lines | {
        "not_utf8": b'{"messages": [{"role": "user", "content": "\xff"}]}',
        "not_json": b'{"messages": [{"role": "user", "con',
        "wrong_shape": b'{"conversation": []}',
        "too_large": b'{"text": "' + b"x" * 10_000_000 + b'"}',
    }


def test_prepare_counts_bad_records_by_line_and_goes_on(
    folder, tmp_path, tokenizer, ask, lines_of
):
    path = folder / "train_sft-00000.jsonl"
    good = path.read_bytes().splitlines()
    bad = bad_lines()
    lines = list(good)
    # Between good ones, the last one cut short without an end of line.
    for number, line in enumerate(bad.values()):
        lines.insert(1 + 3 * number, line)
    path.write_bytes(b"\n".join([*lines, good[0][:50]]))
    manifest = prepare(ask(folder, tmp_path / "out"), tokenizer)
    wanted = dict.fromkeys(bad, 1) | {"not_json": 2}
    assert manifest.left_out == wanted
    assert set(wanted) < set(REASONS)
    assert manifest.records == 120 + len(bad) + 1
    dataset = load_dataset(tmp_path / "out", tokenizer, seq_len=2048)
    assert dataset.info.train.examples == 100
    found = [
        (line["reason"], int(re.search(r"line (\d+)$", line["origin"])[1]))
        for line in lines_of(tmp_path / "out")
    ]
    numbered = [(reason, 2 + 3 * n) for n, reason in enumerate(bad)]
    assert found == [*numbered, ("not_json", len(lines) + 1)]
    assert all(line["message"] for line in lines_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": []}\n', r"no example is left .*no_answer: 1"),
        ("", "is empty"),
    ],
)
def test_prepare_says_when_nothing_is_left(tmp_path, tokenizer, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    asked = PrepareOptions(str(path), str(tmp_path / "out"), jobs=1)
    with pytest.raises(DataError, match=message):
        prepare(asked, tokenizer)


def test_prepare_says_when_all_are_too_long_and_can_be_asked_again(
    folder, tmp_path, tokenizer, ask, lines_of
):
    output = tmp_path / "out"
    with pytest.raises(DataError, match=r"too_long: 120.* shortest .* has \d+ tokens"):
        prepare(ask(folder, output, max_tokens=4), tokenizer)
    assert [path.name for path in output.iterdir()] == [REPORT]
    assert len(lines_of(output)) == 120
    assert prepare(ask(folder, output), tokenizer).records == 120


def test_prepare_says_when_a_side_is_empty(folder, tmp_path, tokenizer, ask):
    (folder / "test_sft-00000.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="nothing is left on the validation side"):
        prepare(ask(folder, tmp_path / "out"), tokenizer)


def test_prepare_needs_a_template(folder, tmp_path, base_tokenizer, ask):
    asked = ask(folder, tmp_path / "out")
    with pytest.raises(DataError, match=r"--chat-template FILE"):
        prepare(asked, base_tokenizer)


def test_prepare_takes_text_and_completions(tmp_path, base_tokenizer):
    path = tmp_path / "a.jsonl"
    records = [{"text": "that is all. " * 40}, {"prompt": "Why?", "completion": "So."}]
    path.write_text("\n".join(map(json.dumps, records)))
    asked = PrepareOptions(
        str(path), str(tmp_path / "out"), held_out_fraction=0.0, max_tokens=32, jobs=1
    )
    manifest = prepare(asked, base_tokenizer)
    assert manifest.chats  # a completion would be rendered, had it a template
    options = {"held_out_fraction": 0.0, "seq_len": 20}
    shards = load_dataset(tmp_path / "out", base_tokenizer, **options)
    raw = load_dataset(path, base_tokenizer, **options)
    # Windows of 32 tokens cut into 20 and 13: other borders, each token once.
    assert shards.info.train.counted_tokens == raw.info.train.counted_tokens
    assert shards.info.train.tokens >= raw.info.train.tokens


def test_prepare_tells_what_is_not_used_and_goes_on_with_its_date(
    tmp_path, tokenizer, ask, monkeypatch
):
    turns = [{"role": "user", "content": "Q", "name": "Ann"}]
    turns.append({"role": "assistant", "content": "A"})
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train-0.jsonl", "test-0.jsonl", "README.txt"):
        lines = [json.dumps({"messages": turns, "n": n}) for n in range(3)]
        (source / name).write_text("\n".join(lines))
    clock = "{{ strftime_now('%Y') }} " + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", clock)
    options = {"split": None, "validation_split": None, "held_out_fraction": 0.0}
    asked = ask(source, tmp_path / "out", **options)
    begun = dataclasses.replace(asked, template_date="2001-01-31")
    manifest = prepare(begun, tokenizer)
    assert manifest.unused_keys == {"n": 3, "name": 3}
    assert sorted(map(os.path.basename, manifest.skipped_files)) == [
        "README.txt",
        "test-0.jsonl",
    ]
    assert "split train" in manifest.notes[0]
    # Asked for again without a date: all is done, with the first one.
    assert prepare(asked, tokenizer) == manifest
    data = load_dataset(
        tmp_path / "out", tokenizer, seq_len=64, held_out_fraction=0.0
    ).train
    assert tokenizer.decode(data.table[0].ids.tolist()).startswith("2001 ")


def test_prepare_reads_a_data_set_of_the_hub(tmp_path, tokenizer, monkeypatch, ask):
    import datasets

    splits = {
        f"{side}_sft": datasets.Dataset.from_dict(
            {"prompt": [f"{side} {n}?" for n in range(5)], "completion": ["So."] * 5}
        )
        for side in ("train", "test")
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: splits[split])
    manifest = prepare(ask("owner/name", tmp_path / "out"), tokenizer)
    assert manifest.records == 10
    names = [source["name"] for source in manifest.sources]
    assert names == ["owner/name:train_sft", "owner/name:test_sft"]
    info = load_dataset(tmp_path / "out", tokenizer, seq_len=64).info
    assert (info.train.examples, info.held_out.examples) == (5, 5)
