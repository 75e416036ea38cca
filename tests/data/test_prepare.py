"""From raw conversations to shards: nothing lost or doubled, and why others are not."""

import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil

import numpy as np
import pytest

from taid_jax.data import DataError, load_dataset, rows
from taid_jax.data import prepare as module
from taid_jax.data.errors import REASONS
from taid_jax.data.prepare import PRESETS, REPORT, PrepareOptions, prepare
from taid_jax.data.shards import read_manifest
from taid_jax.settings import SettingsError


def write_ultrachat(path, make_conversations, count, seed):
    """Records as HuggingFaceH4/ultrachat_200k has them; all open with the user."""
    lines = []
    for number, messages in enumerate(make_conversations(count, seed=seed)):
        turns = [m for m in messages if m["role"] != "system"]
        name = f"{seed:04}{number:060x}"
        record = {"prompt": turns[0]["content"], "prompt_id": name, "messages": turns}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def source(tmp_path_factory, make_conversations):
    """A copy of the data set's folder: two splits, and one that nobody asks for."""
    folder = tmp_path_factory.mktemp("source")
    for name, count, seed in [
        ("train_sft-00000", 60, 1),
        ("train_sft-00001", 40, 2),
        ("test_sft-00000", 20, 3),
        ("train_gen-00000", 10, 4),
    ]:
        write_ultrachat(folder / f"{name}.jsonl", make_conversations, count, seed)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """The same, to be changed."""
    return pathlib.Path(shutil.copytree(source, tmp_path / "source"))


def ask(folder, output, **options):
    values = {"split": "train_sft", "validation_split": "test_sft", "jobs": 1}
    return PrepareOptions(str(folder), str(output), **values | options)


@pytest.fixture(scope="module")
def prepared(source, tokenizer, tmp_path_factory):
    """What is made of the folder, not to be changed."""
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(ask(source, output), tokenizer)
    return output


def texts_of(names, tokenizer, side, **options):
    """The text of each example on a side, in order."""
    dataset = load_dataset(names, tokenizer, seq_len=2048, pack=False, **options)
    examples = getattr(dataset, side)
    return [
        tokenizer.decode(examples.table[number].ids.tolist())
        for (number,) in examples.rows
    ]


def rendered(folder, pattern, tokenizer):
    """The texts that the template makes of files, in order."""
    return [
        tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        for path in sorted(folder.glob(pattern))
        for line in path.read_text().splitlines()
    ]


def lines_of(output):
    return [json.loads(line) for line in (output / REPORT).read_text().splitlines()]


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def test_prepare_puts_every_conversation_on_its_side(source, prepared, tokenizer):
    manifest = read_manifest(prepared)
    assert manifest.records == 120
    assert manifest.left_out == {}
    for side, pattern in [("train", "train_sft*"), ("held_out", "test_sft*")]:
        found = texts_of(prepared, tokenizer, side)
        given = rendered(source, pattern, tokenizer)
        assert sorted(found) == sorted(given)
        assert found != given  # shuffled
    assert sum(f.examples for f in manifest.files if f.side == "validation") == 20
    names = {"manifest.json", REPORT, *(file.name for file in manifest.files)}
    assert set(contents(prepared)) == names


def test_prepare_shuffles_by_its_seed_and_validates_on_so_many(
    source, prepared, tokenizer, tmp_path
):
    asked = ask(source, tmp_path / "out", seed=1, validation_limit=5)
    assert prepare(asked, tokenizer).left_out == {"beyond_limit": 15}
    first, other = (
        texts_of(output, tokenizer, "train") for output in (prepared, tmp_path / "out")
    )
    assert first != other
    assert sorted(first) == sorted(other)
    validated = texts_of(tmp_path / "out", tokenizer, "held_out")
    assert len(validated) == 5
    given = collections.Counter(rendered(source, "test_sft*", tokenizer))
    assert not collections.Counter(validated) - given


@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_prepare_gives_what_reading_the_files_gives(
    source, prepared, tokenizer, tmp_path, train_on_prompts
):
    """The same tokens, the same counted ones, the same last answers; other order."""
    if train_on_prompts:
        prepared = tmp_path / "out"
        preset = {**PRESETS["ultrachat"], "data": str(source), "jobs": 1}
        manifest = prepare(PrepareOptions(output=str(prepared), **preset), tokenizer)
        assert manifest.records == 120
        with pytest.raises(DataError, match="prepared with --train-on-prompts"):
            load_dataset(prepared, tokenizer, seq_len=2048)
    options = {"seq_len": 2048, "train_on_prompts": train_on_prompts}
    files = [source / f"train_sft-0000{n}.jsonl" for n in (0, 1)]
    raw = load_dataset(files, tokenizer, held_out_fraction=0.0, **options)
    shards = load_dataset(prepared, tokenizer, **options)
    found = []
    for dataset in (shards, raw):
        table, rows = dataset.train.table, dataset.train.rows
        examples = [table[number] for row in rows for number in row]
        found.append(
            sorted(
                (ids.tolist(), counted.tolist(), prompt, end)
                for ids, counted, prompt, end, _ in examples
            )
        )
    assert found[0] == found[1]


@pytest.mark.slow
def test_prepare_gives_the_same_bytes_however_it_is_shared_out(
    source, tmp_path, tokenizer
):
    for name, jobs in (("one", 1), ("two", 2)):
        asked = ask(source, tmp_path / name, shard_tokens=2000, jobs=jobs)
        prepare(asked, tokenizer)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_prepare_gives_the_same_examples_in_any_shards(
    source, prepared, tmp_path, tokenizer
):
    """The order of the shuffle does not hang on the shards."""
    prepare(ask(source, tmp_path / "out", shard_tokens=2000), tokenizer)
    # Of about the size that was asked for.
    sizes = [f.tokens for f in read_manifest(tmp_path / "out").files[:-1]]
    assert len(sizes) > 3
    assert max(sizes) < 2000 * 1.5
    assert min(sizes) > 2000 / 2
    small, large = (
        load_dataset(output, tokenizer, seq_len=2048).train.table
        for output in (tmp_path / "out", prepared)
    )
    np.testing.assert_array_equal(small.ids, large.ids)
    np.testing.assert_array_equal(small.starts, large.starts)


class Killed(BaseException):
    """As if the process had gone."""


def test_prepare_goes_on_after_being_killed(source, tmp_path, tokenizer, monkeypatch):
    """Killed at some writes, whole or with half a file left behind."""
    options = {"shard_tokens": 3000}
    prepare(ask(source, tmp_path / "whole", **options), tokenizer)
    draw = random.Random(0)
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
        for allowed in (*range(5), *(draw.randint(5, 60) for _ in range(100))):
            left = allowed
            try:
                prepare(ask(source, tmp_path / "killed", **options), tokenizer)
                break
            except Killed:
                killed += 1
                with pytest.raises(DataError):  # unfinished data are not read
                    load_dataset(tmp_path / "killed", tokenizer, seq_len=2048)
    assert killed > 4
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_prepare_goes_on_with_the_same_alone_and_encodes_nothing_again(
    folder, tmp_path, tokenizer, monkeypatch
):
    options = ask(folder, tmp_path / "out")
    monkeypatch.setattr(module, "choose", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(options, tokenizer)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"begun otherwise.*seed was 0, now 1"):
        prepare(ask(folder, tmp_path / "out", seed=1), tokenizer)
    path = folder / "train_sft-00000.jsonl"
    before, text = path.stat(), path.read_text()
    path.write_text(text + "\n")
    with pytest.raises(DataError, match="files of the source have changed"):
        prepare(options, tokenizer)
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setattr(rows._Encode, "__call__", None)  # not to be called
    assert prepare(options, tokenizer).records == 120


def test_prepare_is_done_when_it_is_done_and_refuses_something_else(
    source, prepared, tmp_path, tokenizer, monkeypatch
):
    output = pathlib.Path(shutil.copytree(prepared, tmp_path / "out"))
    monkeypatch.setattr(module, "find_source", None)  # not to be called
    assert prepare(ask(source, output), tokenizer) == read_manifest(prepared)
    with pytest.raises(DataError, match=r"options\.max_tokens was 2048, now 100"):
        prepare(ask(source, output, max_tokens=100), tokenizer)
    assert contents(output) == contents(prepared)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("a")
    with pytest.raises(DataError, match="is not empty"):
        prepare(ask(source, tmp_path / "other"), tokenizer)
    with pytest.raises(DataError, match="is not a folder"):
        prepare(ask(source, tmp_path / "other" / "precious.txt"), tokenizer)


def test_ultrachat_preset_is_the_published_recipe():
    options = PrepareOptions(output="out", **PRESETS["ultrachat"])
    assert options.data == "HuggingFaceH4/ultrachat_200k"
    assert (options.split, options.validation_split) == ("train_sft", "test_sft")
    limits = (options.max_tokens, options.max_prompt, options.max_answer)
    assert limits == (2048, 1536, 512)
    assert options.validation_limit == 2000
    assert options.train_on_prompts


def test_prepare_limits_conversations_and_says_why(source, tmp_path, tokenizer):
    limits = {"max_tokens": 240, "max_prompt": 200, "max_answer": 25}
    manifest = prepare(ask(source, tmp_path / "out", **limits), tokenizer)
    assert set(manifest.left_out) == {"too_long", "prompt_too_long", "answer_too_long"}
    saved = sum(file.examples for file in manifest.files)
    assert saved + sum(manifest.left_out.values()) == 120
    table = load_dataset(tmp_path / "out", tokenizer, seq_len=2048).train.table
    for number in range(len(table)):
        ids, _, prompt, end, _ = table[number]
        assert len(ids) <= 240
        assert prompt <= 200
        assert end - prompt <= 25
    reasons = collections.Counter(line["reason"] for line in lines_of(tmp_path / "out"))
    assert reasons == manifest.left_out


def test_prepare_holds_out_by_prompts_without_a_validation_source(
    source, tmp_path, tokenizer
):
    """The same documents as `load_dataset`."""
    asked = ask(source, tmp_path / "out", validation_split=None, held_out_fraction=0.2)
    manifest = prepare(asked, tokenizer)
    assert manifest.noted == {}
    files = [source / f"train_sft-0000{n}.jsonl" for n in (0, 1)]
    for side in ("train", "held_out"):
        ours = texts_of(tmp_path / "out", tokenizer, side)
        theirs = texts_of(files, tokenizer, side, held_out_fraction=0.2)
        assert sorted(ours) == sorted(theirs)


def test_prepare_takes_validation_data_from_elsewhere(source, tmp_path, tokenizer):
    options = {"split": None, "validation_split": None}
    asked = ask(
        source / "train_sft-00000.jsonl",
        tmp_path / "out",
        validation_data=str(source / "test_sft-00000.jsonl"),
        **options,
    )
    manifest = prepare(asked, tokenizer)
    assert [source["side"] for source in manifest.sources] == ["train", "validation"]
    assert manifest.records == 80
    with pytest.raises(SettingsError, match="need no validation_split beside it"):
        ask(source, tmp_path / "other", validation_data=str(source))
    both = ask(source, tmp_path / "other", validation_data=str(source), **options)
    with pytest.raises(DataError, match="both trained and validated on"):
        prepare(both, tokenizer)


def chat_line(*turns):
    messages = [{"role": role, "content": text} for role, text in turns]
    return json.dumps({"messages": messages}).encode()


BAD_LINES = {
    "starts_with_assistant": chat_line(("assistant", "So."), ("user", "Why?")),
    "empty_turn": chat_line(("user", "Why?"), ("assistant", " \n")),
    "unknown_role": chat_line(("user", "Why?"), ("narrator", "He said")),
    "no_answer": chat_line(("user", "Why?")),
    "not_utf8": b'{"messages": [{"role": "user", "content": "\xff"}]}',
    "not_json": b'{"messages": [{"role": "user", "con',
    "wrong_shape": b'{"conversation": []}',
    "too_large": b'{"text": "' + b"x" * 10_000_000 + b'"}',
}


def test_prepare_names_every_record_that_it_leaves_out(folder, tmp_path, tokenizer):
    path = folder / "train_sft-00000.jsonl"
    good = path.read_bytes().splitlines()
    lines = list(good)
    # Between good ones, the last one cut short without an end of line.
    for number, line in enumerate(BAD_LINES.values()):
        lines.insert(1 + 3 * number, line)
    path.write_bytes(b"\n".join([*lines, good[0][:50]]))
    # Copies, another answer to a prompt, and one that is validated on.
    path = folder / "train_sft-00001.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    changed = json.loads(json.dumps(records[4]))
    changed["messages"][-1]["content"] = "Another answer."
    first = json.loads((folder / "test_sft-00000.jsonl").read_text().splitlines()[0])
    leaked = {**records[7], "prompt_id": "leaked", "messages": first["messages"]}
    records = [*records, records[2], changed, records[2], leaked]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    manifest = prepare(ask(folder, tmp_path / "out"), tokenizer)
    assert set(BAD_LINES) < set(REASONS)
    wanted = dict.fromkeys(BAD_LINES, 1) | {"not_json": 2, "copy": 2}
    assert manifest.left_out == wanted
    assert manifest.noted == {"same_name": 1, "prompt_on_both_sides": 1}
    assert manifest.records == 120 + len(BAD_LINES) + 1 + 4
    assert len(texts_of(tmp_path / "out", tokenizer, "train")) == 102
    report = lines_of(tmp_path / "out")
    assert all(line["message"] for line in report)
    found = [
        (line["reason"], line["origin"].rpartition("/")[2].removesuffix(".jsonl"))
        for line in report
    ]
    bad, more = "train_sft-00000.jsonl, line", "train_sft-00001.jsonl, line"
    numbered = [(reason, f"{bad} {2 + 3 * n}") for n, reason in enumerate(BAD_LINES)]
    assert found[: len(BAD_LINES) + 1] == [
        *numbered,
        ("not_json", f"{bad} {len(lines) + 1}"),
    ]
    assert set(found[len(BAD_LINES) + 1 :]) == {
        ("copy", f"{more} 41"),
        ("same_name", f"{more} 42"),
        ("copy", f"{more} 43"),
        ("prompt_on_both_sides", "test_sft-00000.jsonl, line 1"),
    }


def test_prepare_says_when_all_are_too_long_and_can_be_asked_again(
    folder, tmp_path, tokenizer
):
    output = tmp_path / "out"
    with pytest.raises(DataError, match=r"too_long: 120.* shortest .* has \d+ tokens"):
        prepare(ask(folder, output, max_tokens=4), tokenizer)
    assert [path.name for path in output.iterdir()] == [REPORT]
    assert len(lines_of(output)) == 120
    (folder / "test_sft-00000.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="nothing is left on the validation side"):
        prepare(ask(folder, output), tokenizer)


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
    tmp_path, tokenizer, monkeypatch
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
    skipped = sorted(map(os.path.basename, manifest.skipped_files))
    assert skipped == ["README.txt", "test-0.jsonl"]
    assert "split train" in manifest.notes[0]
    # Asked for again without a date: all is done, with the first one.
    assert prepare(asked, tokenizer) == manifest
    [*texts] = texts_of(tmp_path / "out", tokenizer, "train")
    assert texts[0].startswith("2001 ")


def test_prepare_reads_a_data_set_of_the_hub(tmp_path, tokenizer, monkeypatch):
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
