"""From raw conversations to shards: nothing lost, nothing doubled, stopped or not."""

import pathlib
import random

import numpy as np
import pytest

from taid_jax.data import DataError, load_dataset
from taid_jax.data import prepare as module
from taid_jax.data.prepare import PRESETS, REPORT, PrepareOptions, prepare
from taid_jax.data.shards import read_manifest


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


@pytest.mark.parametrize("pack", [False, True])
def test_prepare_keeps_every_conversation_on_its_side(
    folder, tmp_path, tokenizer, pack, ask, conversations, rendered
):
    manifest = prepare(ask(folder, tmp_path / "out"), tokenizer)
    assert manifest.records == 120
    assert manifest.left_out == {}
    dataset = load_dataset(tmp_path / "out", tokenizer, seq_len=2048, pack=pack)
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
    styled_tokenizer, folder, tmp_path, train_on_prompts, ask
):
    """The same tokens, the same counted ones, the same last answers; other order."""
    options = {"seq_len": 2048, "train_on_prompts": train_on_prompts}
    source = [folder / f"train_sft-0000{n}.jsonl" for n in (0, 1)]
    raw = load_dataset(source, styled_tokenizer, held_out_fraction=0.0, **options)
    asked = ask(folder, tmp_path / "out", train_on_prompts=train_on_prompts)
    prepare(asked, styled_tokenizer)
    shards = load_dataset(tmp_path / "out", styled_tokenizer, **options)

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
    replace, rows_of = pathlib.Path.replace, module._rows_of
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
        patch.setattr(module, "_PIECE", 30)
        patch.setattr(pathlib.Path, "replace", dies_writing)
        patch.setattr(module, "_rows_of", dies_encoding)
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
    monkeypatch.setattr(module, "_choose", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(options, tokenizer)
    monkeypatch.undo()
    monkeypatch.setattr(module._Encode, "__call__", None)  # not to be called
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
    monkeypatch.setattr(module, "_choose", lambda *_: (_ for _ in ()).throw(Killed))
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
