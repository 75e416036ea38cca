"""Which records are kept, and what is said of the others."""

import collections
import dataclasses
import json
import os
import re

import pytest

from taid_jax.data import DataError, load_dataset
from taid_jax.data.errors import FILTERS, REASONS
from taid_jax.data.prepare import REPORT, PrepareOptions, prepare


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


def test_prepare_counts_what_the_template_refuses(
    folder, tmp_path, tokenizers, ask, lines_of
):
    path = folder / "train_sft-00000.jsonl"
    twice = [{"role": "user", "content": "Why?"}] * 2
    line = json.dumps({"messages": [*twice, {"role": "assistant", "content": "So."}]})
    path.write_text(path.read_text() + line + "\n")
    manifest = prepare(ask(folder, tmp_path / "out"), tokenizers["llama2"])
    assert manifest.left_out == {"template_refuses": 1}
    [problem] = lines_of(tmp_path / "out")
    assert problem["origin"].endswith("line 61")
    assert "roles must alternate" in problem["message"]


def test_prepare_counts_a_parquet_file_cut_short(folder, tmp_path, tokenizer, ask):
    (folder / "train_sft-00002.parquet").write_bytes(b"PAR1 and then no more")
    manifest = prepare(ask(folder, tmp_path / "out"), tokenizer)
    assert manifest.left_out == {"damaged_file": 1}


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


def test_reasons_and_filters_have_names_of_their_own():
    assert not set(REASONS) & set(FILTERS)


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
