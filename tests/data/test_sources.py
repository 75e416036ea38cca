"""What a source is, and one clear message for each record that cannot be used."""

import gzip
import json
import sys
import types

import pyarrow
import pytest

from taid_jax.data.documents import Text
from taid_jax.data.errors import DataError, LeftOut, RecordError
from taid_jax.data.intake import read_documents
from taid_jax.data.sources import find_source, read_source


def read(names, policy="raise"):
    """The documents, as training finds them, and what is left out."""
    left_out = LeftOut(policy)
    documents = []
    for origin, document in read_documents(read_source(find_source(names)), 0):
        if isinstance(document, RecordError):
            left_out.add(origin, document)
        else:
            documents.append((origin, document))
    return documents, left_out


def texts_of(documents):
    return [document.content.text for _, document in documents]


def test_find_source_reads_a_folder_in_order_and_names_what_it_passes_over(tmp_path):
    texts = {
        "a/c.txt": b"a",
        "b.json": b'[{"text": "b"}]',
        "c.csv": b"text\nc",
        "d.txt.gz": gzip.compress(b"d"),
        "z.jsonl": b'{"text": "z"}',
    }
    passed = [".git/d.txt", "README.md", "dataset_info.json", "e.jsonl.zst", "f/g.xlsx"]
    for name, data in (texts | dict.fromkeys(passed, b"{}")).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert texts_of(read(tmp_path)[0]) == ["a", "b", "c", "d", "z"]
    skipped = find_source(tmp_path).skipped_files
    assert skipped == [str(tmp_path / name) for name in sorted(passed)]
    listed, _ = read([tmp_path / "z.jsonl", str(tmp_path / "a")])
    assert texts_of(listed) == ["z", "a"]


def test_find_source_names_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist; .*pydoc"):
        find_source(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"holds no file ending in \.txt, \.jsonl"):
        find_source(tmp_path)
    path = tmp_path / "data.xlsx"
    path.write_text("a,b")
    with pytest.raises(DataError, match=r"ending \.xlsx; .*\.txt, \.jsonl, \.parquet"):
        find_source(path)


BAD_LINES = {
    b"plain words": "line 2: not JSON",
    b'{"text": "\xff"}': "line 2: not UTF-8 .*0xff",
    b"[1, 2]": "line 2: need an object .*got a list",
    b"[" * 100_000: "line 2: not JSON",
    b'{"content": "a", "id": 1}': "`messages`; found `content`, `id`",
    b"{}": "found none",
    b'{"text": "\\ud800"}': "surrogate",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_read_documents_names_a_bad_line_and_goes_on(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(DataError, match=BAD_LINES[line]) as caught:
        read(path)
    documents, left_out = read(path, "count")
    assert texts_of(documents) == ["one", "three"]
    [problem] = left_out.problems
    assert str(caught.value) == f"{path}, line 2: {problem.message}"


SPLITS = {
    "files": ["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"],
    "in_data": ["data/train-0.jsonl", "data/validation-0.jsonl", "data/test-0.jsonl"],
    "folders": ["train/a.jsonl", "test/a.jsonl", "dev/b.jsonl"],
    "plain": ["train.jsonl", "valid.jsonl"],
    "sft": ["train_sft-0.jsonl", "test_sft-0.jsonl"],
}


@pytest.mark.parametrize("names", SPLITS.values(), ids=SPLITS)
def test_find_source_takes_train_where_there_are_splits(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert texts_of(read(tmp_path)[0]) == names[:1]
    source = find_source(tmp_path)
    [note] = source.notes
    assert "1 files of the split train are read, and none of " in note
    assert source.skipped_files == sorted(str(tmp_path / name) for name in names[1:])


def test_find_source_takes_all_where_names_tell_no_splits(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "trains.jsonl", "latest.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    source = find_source(tmp_path)
    assert len(source.entries) == 4
    assert not source.notes
    started = find_source(tmp_path, "train-")
    assert len(started.entries) == 2
    with pytest.raises(DataError, match=r"no file .* and beginning with 'train_rl'"):
        find_source(tmp_path, "train_rl")


class FakeSplit:
    """As much of a `datasets.Dataset` as is used of it."""

    def __init__(self, table, split):
        self._table, self.split = table, split
        self.column_names = table.column_names

    def select_columns(self, names):
        return FakeSplit(self._table.select(names), self.split)

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def iter(self, size):
        for start in range(0, len(self._table), size):
            yield self._table.slice(start, size)


@pytest.mark.parametrize("named", [None, "test"])
def test_find_source_reads_a_data_set_of_the_hub(monkeypatch, named):
    asked = []
    splits = {
        name: FakeSplit(pyarrow.table({"text": [f"{name} text", None]}), name)
        for name in ("train", "test")
    }

    def load(name, split, **options):
        asked.append((name, split, options))
        return splits if split is None else splits[split]

    fake = types.SimpleNamespace(load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    name = "owner/name" if named is None else f"owner/name:{named}"
    [(origin, document)], left_out = read(name, "count")
    split = named or "train"
    assert document.content == Text(f"{split} text")
    assert origin == f"owner/name:{split}, row 1"
    assert dict(left_out.reasons) == {"wrong_shape": 1}
    assert asked == [("owner/name", named, {})]  # nothing that would run its code
    notes = [] if named else ["owner/name: the split train is read"]
    assert find_source(name).notes == notes
    del splits["train"]
    splits["other"] = splits["test"]
    with pytest.raises(DataError, match=r"has the splits test, other; .* --split"):
        find_source("owner/name")


def test_find_source_says_that_the_hub_has_no_such_data_set(monkeypatch):
    def load(name, split):
        raise ConnectionError("no network")

    fake = types.SimpleNamespace(load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    message = "owner/name is no file or folder here, and as a data set .* no network"
    with pytest.raises(DataError, match=message):
        find_source("owner/name")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x/" * 3000])
def test_find_source_refuses_names_that_no_file_has(name):
    with pytest.raises(DataError, match=r"cannot be a file|does not exist"):
        find_source(name)
