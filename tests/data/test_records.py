"""Records: each bad one named and the others kept, whatever the kind of file."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from taid_jax.data import records as rec
from taid_jax.data.errors import DataError, RecordError
from taid_jax.data.records import read_file


def read(path, limit=1000):
    """The sound records, and (origin, reason, message) of the others."""
    found, problems = [], []
    for origin, record in read_file(path, limit):
        if isinstance(record, RecordError):
            problems.append((origin, record.reason, str(record)))
        else:
            found.append(record)
    return found, problems


def texts_of(found):
    return [record["text"] for record in found]


def test_read_file_passes_over_a_line_of_ten_megabytes(tmp_path):
    path = tmp_path / "a.jsonl"
    large = json.dumps({"text": "x" * 10_000_000})
    path.write_text(f'{{"text": "one"}}\n{large}\n{{"text": "three"}}\n')
    found, [problem] = read(path, 4_000_000)
    assert texts_of(found) == ["one", "three"]
    message = f"a record of {len(large) + 1:,} bytes; the limit is 4,000,000"
    assert problem[:2] == (f"{path}, line 2", "too_large")
    assert problem[2].startswith(message)


def test_read_file_takes_a_record_of_just_the_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 50})
    path.write_text(line + "\n" + line)
    for limit, count in [(len(line) + 1, 2), (len(line), 2), (len(line) - 1, 0)]:
        found, problems = read(path, limit)
        assert (len(found), len(problems)) == (count, 2 - count), limit


def test_read_file_passes_over_blank_lines_but_counts_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "one"}\n\n{"text": "two"}\n\n', encoding="utf-8")
    origins = [origin for origin, _ in read_file(path)]
    assert origins == [f"{path}, line 1", f"{path}, line 3"]


def test_read_file_names_the_row_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.parquet"
    bytes_ = pyarrow.array([b"one", b"t\xffwo", b"three"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, bytes_.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    found, [problem] = read(path)
    assert texts_of(found) == ["one", "three"]
    assert problem[:2] == (f"{path}, row 2", "not_utf8")
    assert "byte 1" in problem[2]


RECORDS = [
    {"prompt": "Two\nlines, one field", "response": "Yes."},
    {"prompt": 'Quote "a [b {c"', "response": "é ]}"},
]


def write_as(path, records):
    """The records in the kind of file that the name asks for."""
    name = path.name.removesuffix(".gz")
    columns = {key: [record[key] for record in records] for key in records[0]}
    if name.endswith(".jsonl"):
        data = "\n".join(map(json.dumps, records))
    elif name.endswith("lines.json"):
        data = "".join(json.dumps(record) + "\n" for record in records)
    elif name.endswith("pretty.json"):
        data = "\n".join(json.dumps(record, indent=2) for record in records)
    elif name.endswith(".json"):
        data = "\ufeff" + json.dumps(records, indent=1, ensure_ascii=False)
    elif name.endswith((".csv", ".tsv")):
        cut = "," if name.endswith(".csv") else "\t"
        rows = [list(columns), *([*record.values()] for record in records)]
        data = "\r\n".join(
            cut.join('"' + cell.replace('"', '""') + '"' for cell in row)
            for row in rows
        )
    else:
        table = pyarrow.table(columns)
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(table, path)
            return path
        kind = pyarrow.ipc.new_stream if "stream" in name else pyarrow.ipc.new_file
        with kind(path, table.schema) as writer:
            writer.write_table(table)
        return path
    packed = gzip.compress if path.name.endswith(".gz") else bytes
    path.write_bytes(packed(data.encode()))
    return path


KINDS = [
    *("a.jsonl", "a.json", "lines.json", "pretty.json", "a.csv", "a.tsv", "a.parquet"),
    *("a.arrow", "stream.arrow", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "A.JSONL.GZ"),
]


@pytest.mark.parametrize("name", KINDS)
def test_read_file_reads_every_kind_of_file_alike(tmp_path, name):
    path = write_as(tmp_path / name.lower(), RECORDS).rename(tmp_path / name)
    found = list(read_file(path))
    assert [record for _, record in found] == RECORDS
    assert re.search(r"(line|row|record) 2$", found[1][0])


@pytest.mark.parametrize(
    ("name", "data", "texts", "reasons"),
    [
        ("a.json", b'[{"text": "one"}, {"te": "}, {"text": "two"}]', 1, "damaged_file"),
        ("a.json", b'[{"text": "one"}, {"text": "two"}, {"te', 2, "damaged_file"),
        ("a.json", b'[{"text": "one"}, {"text": "two"}', 2, "damaged_file"),
        ("a.json", b'[{"text": "one"},\n{"text": "two"},\n', 2, "damaged_file"),
        ("a.json", b'[{"text": "one"}, {"text": "two"}] more', 2, "damaged_file"),
        ("a.json", b'[{"text": "one"}]\n[{"text": "two"}]', 1, "damaged_file"),
        ("a.json", b'{"text": "one"}\nwords\n{"text": "two"}', 2, "not_json"),
        ("a.json", b'[{"text": "one"},\n{"te": ,\n{"text": "two"}]', 2, "not_json"),
        (
            "a.json",
            b'[\n  {\n    "text": "one"\n  },\n  {\n    "a": [\n      {\n'
            b'        "b": ?\n      }\n    ]\n  },\n  {"text": "two"}\n]\n',
            2,
            "not_json",
        ),
        ("a.json", b'[{"text": "one"}, ' + b"[" * 10**5, 1, "damaged_file"),
        (
            "a.json",
            b'[{"text": "one"}, ["' + b"x" * 2000 + b'"], {"text": "two"}]',
            2,
            "too_large",
        ),
        ("a.csv", b'text,n\none,1\ntwo,2\n"open, 3\ntwo,3', 2, "wrong_shape"),
        (
            "a.csv",
            b"text,n\none,1\ntoo,many,3\nfew\n\ntwo,2",
            2,
            "wrong_shape wrong_shape",
        ),
        ("a.csv", b"text\none\n" + b"x" * 2000 + b"\ntwo", 2, "too_large"),
        ("a.jsonl.gz", b"no gzip at all", 0, "damaged_file"),
    ],
)
def test_read_file_hands_on_what_is_bad_of_every_kind(
    tmp_path, name, data, texts, reasons
):
    path = tmp_path / name
    path.write_bytes(data)
    found, problems = read(path)
    assert texts_of(found) == ["one", "two"][:texts]
    assert [reason for _, reason, _ in problems] == reasons.split()
    assert all(str(path) in origin for origin, *_ in problems)


def test_read_file_leaves_bytes_that_are_no_utf8_to_their_record(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "\xff"}, {"text": "two"}]')
    assert texts_of(read(path)[0]) == ["\udcff", "two"]


def test_read_file_reads_a_gzip_file_cut_short_as_far_as_it_goes(tmp_path):
    lines = "".join(json.dumps({"text": f"text {n * n}"}) + "\n" for n in range(9999))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode())[:-1000])
    found, [problem] = read(path)
    assert found[0]["text"] == "text 0"
    assert problem[1] == "damaged_file"


def test_read_file_refuses_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,response\nQ,A,B\n")
    with pytest.raises(DataError, match="two columns have the same name"):
        read(path)


@pytest.mark.parametrize("damage", ["cut short", "page", "stream", "something else"])
def test_read_file_says_that_a_table_is_damaged(tmp_path, damage):
    table = pyarrow.table({"text": [f"text {n * n}" for n in range(2000)]})
    path = tmp_path / ("a.arrow" if damage == "stream" else "a.parquet")
    if damage == "stream":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
        data = path.read_bytes()[:-100]
    elif damage == "something else":
        data = b"some text in a file with the wrong name"
    else:
        pyarrow.parquet.write_table(table, path)
        data = bytearray(path.read_bytes())
        data[200:300] = b"\xff" * 100
        data = data if damage == "page" else data[:-20]
    path.write_bytes(data)
    [*_, problem] = read(path)[1]
    assert problem[:2] == (str(path), "damaged_file")
    assert problem[2].startswith("no intact ")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_read_file_gives_rows_without_the_nulls_of_a_table(tmp_path, name):
    rows = [{"role": "user", "content": None}], None, [None], []
    kind = pyarrow.list_(
        pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})
    )
    table = pyarrow.table({"messages": pyarrow.array(rows, kind)})
    path = tmp_path / name
    if name == "a.arrow":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(table, path)
    found, _ = read(path)
    assert [r["messages"] for r in found] == [[{"role": "user"}], None, [None], []]


def test_read_file_does_not_read_columns_that_say_nothing(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"text": ["a"], "picture": [b"x" * 5000]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert read(path)[0] == [{"text": "a", "picture": "not read"}]


def test_read_file_reads_more_rows_than_one_read_takes(tmp_path):
    texts = [f"text {n}" for n in range(2500)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    found = list(read_file(path))
    assert texts_of(record for _, record in found) == texts
    assert found[-1][0] == f"{path}, row 2500"


@pytest.mark.parametrize("kind", ["copies", "alone", "together"])
def test_read_file_holds_few_large_rows_at_a_time(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(rec, "_ROW_BYTES", 3_000_000)
    path = tmp_path / "a.parquet"
    row, rows = 1_000_000, 40
    # Copies of one text are written once, and were all held at a time.
    texts = [chr(65 + n * (kind != "copies")) * row for n in range(rows)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}),
        path,
        use_dictionary=kind == "copies",
        row_group_size=1 if kind == "alone" else rows,
    )
    usual = pyarrow.default_memory_pool()
    counting = pyarrow.proxy_memory_pool(usual)
    pyarrow.set_memory_pool(counting)
    try:
        found, problems = read(path, limit=900_000)
    finally:
        pyarrow.set_memory_pool(usual)
    assert found == []
    assert [reason for _, reason, _ in problems] == ["too_large"] * rows
    assert problems[2][0] == f"{path}, row 3"
    # Batches of three rows at most, with what it takes to unpack and copy them.
    assert counting.max_memory() < 12 * row


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b" \n\n "])
def test_read_file_refuses_empty_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    if content and name == "a.parquet":
        assert read(path)[1][0][1] == "damaged_file"
        return
    with pytest.raises(DataError, match=f"{name} is empty"):
        read(path)


def test_read_file_refuses_tables_without_rows(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.array([], pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=r"is empty \(0 rows\)"):
        read(path)


def test_read_file_takes_text_as_it_stands(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo \xc3\xa9\n")
    assert list(read_file(path)) == [(str(path), {"text": "one\n\ntwo é\n"})]
    path.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(DataError, match=r"line 2: not UTF-8 .*0xff at offset 8"):
        read(path)


def test_read_file_says_that_a_file_cannot_be_opened(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
        read(path)
