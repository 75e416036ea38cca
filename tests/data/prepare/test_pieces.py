"""The files of a source: local, or a data set that `datasets` reads."""

import json
import os
import sys

import pyarrow.parquet
import pytest

from taid_jax.data import DataError, load_dataset
from taid_jax.data.errors import BadRecords
from taid_jax.data.prepare import PrepareOptions, prepare
from taid_jax.data.prepare.pieces import cut_sources, export_data_set, list_sources


def ask(data, output, **options):
    return PrepareOptions(str(data), str(output), jobs=1, **options)


@pytest.fixture
def hub(tmp_path, ultrachat, monkeypatch):
    """`datasets` with a cache of its own, and a folder laid out as on the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for split, seed in [("train_sft", 1), ("test_sft", 2)]:
        columns = {key: [] for key in ("prompt", "prompt_id", "messages")}
        for record in ultrachat(30, seed=seed):
            for key, values in columns.items():
                values.append(record[key])
        path = folder / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return folder.parent


def test_list_sources_takes_the_files_of_a_split(folder, tmp_path):
    options = ask(folder, tmp_path, split="train_sft", validation_split="test_sft")
    found = list_sources(options, tmp_path)
    assert [(file.path.name, file.side) for file in found] == [
        ("train_sft-00000.jsonl", "train"),
        ("train_sft-00001.jsonl", "train"),
        ("test_sft-00000.jsonl", "validation"),
    ]
    with pytest.raises(DataError, match=r"no file .* and beginning with 'train_rl'"):
        list_sources(ask(folder, tmp_path, split="train_rl"), tmp_path)
    with pytest.raises(DataError, match="nowhere does not exist"):
        list_sources(ask(tmp_path / "nowhere", tmp_path), tmp_path)


def test_list_sources_leaves_a_readme_beside_the_data_alone(folder, tmp_path):
    (folder / "README.txt").write_text("About the data.")
    bad = BadRecords()
    found = list_sources(ask(folder, tmp_path), tmp_path, bad)
    # Without a split named: what is called train, and nothing of test.
    names = [file.path.name for file in found]
    assert names == [
        "train_gen-00000.jsonl",
        "train_sft-00000.jsonl",
        "train_sft-00001.jsonl",
    ]
    assert sorted(map(os.path.basename, bad.skipped_files)) == [
        "README.txt",
        "test_sft-00000.jsonl",
    ]


def test_cut_sources_puts_training_first(folder, tmp_path):
    options = ask(folder, tmp_path, split="train_sft", validation_split="test_sft")
    work = cut_sources(list_sources(options, tmp_path), 5000)
    sides = [piece.side for piece in work]
    assert sides == sorted(sides)
    assert len(work) > 6
    assert work[0].piece.shown == str(folder / "train_sft-00000.jsonl")


@pytest.mark.filterwarnings("default")  # what `datasets` warns of is not ours
def test_prepare_reads_a_data_set_of_the_hub(hub, tmp_path, tokenizer, monkeypatch):
    """By the name of a repository; the folder stands in for the hub."""
    import datasets

    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **options: load(str(hub), **options)
    )
    name = "HuggingFaceH4/ultrachat_200k"
    options = {"split": "train_sft", "validation_split": "test_sft"}
    manifest = prepare(ask(name, tmp_path / "out", **options), tokenizer)
    assert manifest.records == 60
    shown = [source["name"] for source in manifest.sources]
    assert shown == [f"{name}:train_sft", f"{name}:test_sft"]
    local = prepare(ask(hub, tmp_path / "local", **options), tokenizer)
    assert [f.sha256 for f in local.files] == [f.sha256 for f in manifest.files]
    assert load_dataset(tmp_path / "out", tokenizer, seq_len=2048).info.train.rows
    assert not list((tmp_path / "out").glob("*source*"))


@pytest.mark.filterwarnings("default")
def test_export_data_set_says_what_is_missing(hub, tmp_path):
    with pytest.raises(DataError, match=r"has the splits .*train_sft.* --split"):
        export_data_set(str(hub), None, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"cannot be read: .*train_rl"):
        export_data_set(str(hub), "train_rl", tmp_path / "a.parquet")
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.jsonl").write_text(json.dumps({"question": "a"}) + "\n")
    with pytest.raises(
        DataError, match=r"need the columns .*`messages`; found `question`"
    ):
        export_data_set(str(other), "train", tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


def test_export_data_set_is_not_done_twice(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"there already")
    assert export_data_set("a/b", "train", path) == path
