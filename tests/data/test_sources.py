"""Files to documents, and one clear message for each that cannot be read."""

import gzip
import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from taid_jax.data.documents import Chat, Completion, Text
from taid_jax.data.errors import BadRecords, DataError
from taid_jax.data.sources import read_documents

CHAT = {
    "messages": [
        {"role": "user", "content": "Whether?"},
        {"role": "assistant", "content": "All."},
    ]
}


def read(source, policy="raise"):
    bad = BadRecords(policy)
    return list(read_documents(source, seed=0, bad=bad)), bad


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_read_documents_takes_text_as_it_stands(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo \xc3\xa9\n")
    [document], _ = read(path)
    assert document.content == Text("one\n\ntwo é\n")
    assert document.origin == str(path)


def test_read_documents_takes_every_kind_of_record(write_jsonl, tmp_path):
    records = [
        {"text": "one", "id": 3},
        {"prompt": "a", "completion": "b"},
        # As in UltraChat: the conversation, not the prompt beside it.
        {"prompt": "Whether?", "prompt_id": "x", **CHAT},
        {"text": None, "prompt": "a", "completion": "b"},
    ]
    from_lines, _ = read(write_jsonl(records))
    kinds = [type(document.content) for document in from_lines]
    assert kinds == [Text, Completion, Chat, Completion]
    names = ["text", "prompt", "completion", "messages"]
    columns = {name: [record.get(name) for record in records] for name in names}
    from_rows, _ = read(write_parquet(tmp_path / "a.parquet", columns))
    assert [d.content for d in from_rows] == [d.content for d in from_lines]
    assert [d.rank for d in from_rows] == [d.rank for d in from_lines]
    assert from_lines[1].origin.endswith("data.jsonl, line 2")
    assert from_rows[1].origin.endswith("a.parquet, row 2")


def test_read_documents_passes_over_blank_lines_but_counts_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "one"}\n\n{"text": "two"}\n\n', encoding="utf-8")
    documents, _ = read(path)
    assert [d.content.text for d in documents] == ["one", "two"]
    assert documents[1].origin.endswith("line 3")


def test_read_documents_reads_a_folder_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a/c.txt", "README.md", ".git/d.txt", "z.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = '{"text": "z"}' if name == "z.jsonl" else name
        (tmp_path / name).write_text(text)
    documents, _ = read(tmp_path)
    assert [d.content.text for d in documents] == ["a/c.txt", "b.txt", "z"]
    listed, _ = read([tmp_path / "z.jsonl", str(tmp_path / "a")])
    assert [d.content.text for d in listed] == ["z", "a/c.txt"]


def test_read_documents_reads_more_rows_than_one_read_takes(tmp_path):
    texts = [f"text {n}" for n in range(2500)]
    documents, _ = read(write_parquet(tmp_path / "a.parquet", {"text": texts}))
    assert [d.content.text for d in documents] == texts
    assert documents[-1].origin.endswith("row 2500")


def test_read_documents_gives_the_built_in_corpus():
    documents, _ = read("pydoc")
    assert len(documents) > 50
    assert documents[0].origin.startswith("pydoc, assert: ")


def test_read_documents_names_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist; .*pydoc"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(
        DataError, match=r"holds no file ending in \.txt, \.jsonl, \.pa"
    ):
        read(tmp_path)


def test_read_documents_lists_what_is_supported(tmp_path):
    path = tmp_path / "data.xlsx"
    path.write_text("a,b")
    with pytest.raises(DataError, match=r"ending \.xlsx; .*\.txt, \.jsonl, \.parquet"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b" \n\n "])
def test_read_documents_refuses_empty_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    message = "Parquet" if content and name == "a.parquet" else "is empty"
    with pytest.raises(DataError, match=f"{name}.* {message}"):
        read(path)


def test_read_documents_refuses_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(DataError, match=r"line 2: not UTF-8 .*0xff at offset 8"):
        read(path)


BAD_LINES = {
    b'{"text": "a"': "line 2: not JSON .*column",
    b"plain words": "line 2: not JSON",
    b'{"text": "\xff"}': "line 2: not UTF-8 .*0xff",
    b"[1, 2]": "line 2: need an object .*got a list",
    b"3": "line 2: need an object .*got a number",
    b"[" * 100_000: "line 2: not JSON that can be read",
    b'{"content": "a", "id": 1}': "`messages`; found `content`, `id`",
    b'{"prompt": "a"}': "`prompt` and `completion`.* found `prompt`",
    b"{}": "found none",
    b'{"text": 3}': "`text` must be a string, got a number",
    b'{"text": "\\ud800"}': "surrogate",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_read_documents_stops_at_a_bad_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(DataError, match=BAD_LINES[line]) as caught:
        read(path)
    assert str(path) in str(caught.value)
    documents, bad = read(path, "count")
    assert [d.content.text for d in documents] == ["one", "three"]
    assert bad.count == 1
    assert bad.messages == [str(caught.value)]


def test_read_documents_names_the_columns_of_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"question": ["a"], "answer": ["b"]})
    with pytest.raises(DataError, match="found `question`, `answer`"):
        read(path)
    path = write_parquet(tmp_path / "b.parquet", {"prompt": ["a"]})
    with pytest.raises(DataError, match="found `prompt`"):
        read(path)


def test_read_documents_refuses_parquet_without_rows(tmp_path):
    column = pyarrow.array([], pyarrow.string())
    with pytest.raises(DataError, match=r"is empty \(0 rows\)"):
        read(write_parquet(tmp_path / "a.parquet", {"text": column}))


def test_read_documents_names_the_row_of_parquet(tmp_path):
    chats = [CHAT["messages"], [{"role": "human", "content": "a"}]]
    path = write_parquet(tmp_path / "a.parquet", {"messages": chats})
    with pytest.raises(DataError, match=r"a\.parquet, row 2: unknown role 'human'"):
        read(path)


@pytest.mark.parametrize("damage", ["cut short", "overwritten", "something else"])
def test_read_documents_refuses_damaged_parquet(tmp_path, damage):
    path = tmp_path / "a.parquet"
    texts = [json.dumps(list(range(n, n + 50))) for n in range(3000)]
    data = bytearray(write_parquet(path, {"text": texts}).read_bytes())
    if damage == "cut short":
        data = data[: len(data) // 2]
    elif damage == "overwritten":
        data[200 : len(data) // 2] = bytes(len(data) // 2 - 200)
    else:
        data = b"some text in a file with the wrong name"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet(: no intact Parquet| cannot)"):
        read(path)


def test_read_documents_reports_files_that_cannot_be_opened(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
        read(path)


def test_read_documents_names_the_files_that_it_passes_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "b.json").write_text('[{"text": "two"}]')
    (tmp_path / "c.csv").write_text("text\nthree")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"four"))
    passed = [".DS_Store", "README.md", "dataset_info.json", "e.jsonl.zst", "f/g.xlsx"]
    for name in passed:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    documents, bad = read(tmp_path)
    assert [d.content.text for d in documents] == ["one", "two", "three", "four"]
    assert bad.skipped_files == [str(tmp_path / name) for name in sorted(passed)]


SPLITS = {
    "files": ["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"],
    "in_data": ["data/train-0.jsonl", "data/validation-0.jsonl", "data/test-0.jsonl"],
    "folders": ["train/a.jsonl", "test/a.jsonl", "dev/b.jsonl"],
    "plain": ["train.jsonl", "valid.jsonl"],
    "sft": ["train_sft-0.jsonl", "test_sft-0.jsonl"],
}


@pytest.mark.parametrize("names", SPLITS.values(), ids=SPLITS)
def test_read_documents_takes_train_where_there_are_splits(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    documents, bad = read(tmp_path)
    assert [d.content.text for d in documents] == names[:1]
    [note] = bad.notes
    assert "1 files of the split train are read, and none of " in note
    assert bad.skipped_files == sorted(str(tmp_path / name) for name in names[1:])


def test_read_documents_takes_all_where_names_tell_no_splits(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "trains.jsonl", "latest.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    documents, bad = read(tmp_path)
    assert len(documents) == 4
    assert not bad.notes


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
def test_read_documents_reads_a_data_set_of_the_hub(monkeypatch, named):
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
    source = "owner/name" if named is None else f"owner/name:{named}"
    [document], bad = read(source, "count")
    split = named or "train"
    assert document.content == Text(f"{split} text")
    assert document.origin == f"owner/name:{split}, row 1"
    assert dict(bad.reasons) == {"wrong_shape": 1}
    assert asked == [("owner/name", named, {})]  # nothing that would run its code
    assert bad.notes == ([] if named else ["owner/name: the split train is read"])


def test_read_documents_says_that_the_hub_has_no_such_data_set(monkeypatch):
    def load(name, split):
        raise ConnectionError("no network")

    fake = types.SimpleNamespace(load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    message = "owner/name is no file or folder here, and as a data set .* no network"
    with pytest.raises(DataError, match=message):
        read("owner/name")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x/" * 3000])
def test_read_documents_refuses_names_that_no_file_has(name):
    with pytest.raises(DataError, match=r"cannot be a file|does not exist"):
        read(name)
