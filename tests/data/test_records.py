"""Records: read whole or in pieces, each bad one named and the others kept."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_jax.data import records as rec
from taid_jax.data.errors import BadRecords, DataError
from taid_jax.data.records import (
    Piece,
    cut_jsonl,
    cut_parquet,
)
from taid_jax.data.sources import read_documents, read_piece


def read(pieces, limit=1000):
    bad = BadRecords("count")
    return [d for p in pieces for d in read_piece(p, 0, bad, limit)], bad


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=20),
    st.integers(1, 120),
    st.booleans(),
)
def test_cut_jsonl_gives_every_line_once_with_its_number(
    tmp_path_factory, lengths, size, last_end
):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    # Blank lines, and lines longer than a piece.
    lines = [json.dumps({"text": "x" * n, "id": n}) if n else "" for n in lengths]
    path.write_text("\n".join([*lines, '{"text": "end"}']) + "\n" * last_end)
    pieces = cut_jsonl(path, size)
    assert [p.start for p in pieces[1:]] == [p.stop for p in pieces[:-1]]
    assert pieces[-1].stop == path.stat().st_size
    whole, _ = read([Piece(str(path))])
    parts, bad = read(pieces)
    assert parts == whole
    assert not bad.problems
    if size < 20:  # shorter than any line that is not blank
        assert len(pieces) >= len(whole)


def test_cut_parquet_gives_every_row_once_with_its_number(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"text {n}" for n in range(50)]})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    whole, _ = read([Piece(str(path))])
    assert whole[-1].origin.endswith("a.parquet, row 50")
    for size, count in [(1, 8), (150, None), (10**6, 1)]:
        pieces = cut_parquet(path, size)
        assert count in (None, len(pieces))
        parts, _ = read(pieces)
        assert parts == whole
    assert 1 < len(cut_parquet(path, 150)) < 8


def test_read_piece_calls_the_file_as_it_is_shown(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"txt": 1}\n')
    [document], bad = read([Piece(str(path), shown="hub:train")])
    assert document.origin == "hub:train, line 1"
    assert bad.messages[0].startswith("hub:train, line 2: need the keys")


def test_read_jsonl_passes_over_a_record_of_ten_megabytes(tmp_path):
    path = tmp_path / "a.jsonl"
    large = json.dumps({"text": "x" * 10_000_000})
    path.write_text(f'{{"text": "one"}}\n{large}\n{{"text": "three"}}\n')
    bad = BadRecords("count")
    found = list(read_piece(Piece(str(path)), 0, bad, 4_000_000))
    assert [document.content.text for document in found] == ["one", "three"]
    assert found[1].origin.endswith("line 3")
    assert dict(bad.reasons) == {"too_large": 1}
    size = len(large) + 1
    message = rf"line 2: a record of {size:,} bytes; the limit is 4,000,000"
    assert re.search(message, bad.messages[0])


def test_read_jsonl_takes_a_record_of_just_the_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 50})
    path.write_text(line + "\n" + line)
    for limit, count in [(len(line) + 1, 2), (len(line), 2), (len(line) - 1, 0)]:
        found, bad = read([Piece(str(path))], limit)
        assert (len(found), bad.count) == (count, 2 - count), limit


def test_read_parquet_passes_over_a_large_row(tmp_path):
    path = tmp_path / "a.parquet"
    texts = ["one", "x" * 5000, "three"]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    found, bad = read([Piece(str(path))])
    assert [document.content.text for document in found] == ["one", "three"]
    assert dict(bad.reasons) == {"too_large": 1}
    assert "row 2" in bad.messages[0]


def test_read_parquet_names_the_row_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.parquet"
    bytes_ = pyarrow.array([b"one", b"t\xffwo", b"three"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, bytes_.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    bad = BadRecords("count")
    found = list(read_piece(Piece(str(path)), 0, bad, 1000))
    assert [document.content.text for document in found] == ["one", "three"]
    assert dict(bad.reasons) == {"not_utf8": 1}
    assert re.search(r"row 2: not UTF-8 .* byte 1", bad.messages[0])
    with pytest.raises(DataError, match="row 2: not UTF-8"):
        list(read_piece(Piece(str(path)), 0, BadRecords("raise"), 1000))


def test_read_piece_counts_a_parquet_file_cut_short(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    [piece] = cut_parquet(path, 10)
    found, bad = read([piece])
    assert not found
    assert dict(bad.reasons) == {"damaged_file": 1}
    with pytest.raises(DataError, match="no intact Parquet file"):
        list(read_piece(piece, 0, BadRecords("raise"), 1000))


def test_documents_have_the_name_of_the_record(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [
        {"text": "a", "prompt_id": "p", "id": "i"},
        {"text": "b", "id": 7},
        {"text": "c", "id": None},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    found, _ = read([Piece(str(path))])
    assert [document.name for document in found] == ["p", "7", None]
    columns = {"text": ["a", "b"], "prompt_id": ["p", "q"]}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    found, _ = read([Piece(str(path))])
    assert [document.name for document in found] == ["p", "q"]


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
def test_read_piece_reads_every_kind_of_file_alike(tmp_path, name):
    path = write_as(tmp_path / name.lower(), RECORDS).rename(tmp_path / name)
    found, bad = read([Piece(str(path))])
    said = [(d.content.prompt, d.content.completion) for d in found]
    assert said == [tuple(record.values()) for record in RECORDS]
    assert re.search(r"(line|row|record) 2$", found[1].origin)
    assert not bad.reasons


@pytest.mark.parametrize(
    ("name", "data", "reasons"),
    [
        ("a.json", b'[{"text": "one"}, null, {"text": "x}, {"text": "two"}]', 2),
        ("a.json", b'[{"text": "one"}, {"text": 3}, {"text": "two"}]', 1),
        ("a.json", b'[{"text": "one"}, {"text": "\xff"}, {"text": "two"}]', 1),
        ("a.json", b'[{"text": "one"}, {"text": "two"}, {"te', 1),
        ("a.json", b'[{"text": "one"}, {"text": "two"}] and so on', 1),
        ("a.json", b'{"text": "one"}\nwords\n{"text": "two"}', 1),
        ("a.json", b'[{"text": "one"}, [1], {"text": "two"}, ' + b"[" * 10**5, 2),
        ("a.csv", b'text,n\none,1\n\xff,2\n"open, 3\ntwo,3', 2),
        ("a.csv", b"text,n\none,1\ntoo,many,3\nfew\ntwo,2", 2),
        ("a.csv", b"text\none\n" + b"x" * 2000 + b"\ntwo", 1),
        ("a.csv", b"text,n\none,1\n\n\xff,2\n\n", 1),
        ("a.jsonl.gz", b"no gzip at all", 1),
    ],
)
def test_read_piece_counts_bad_records_of_every_kind(tmp_path, name, data, reasons):
    path = tmp_path / name
    path.write_bytes(data)
    found, bad = read([Piece(str(path))])
    texts = [document.content.text for document in found]
    assert bad.count == reasons, (texts, bad.messages)
    if name != "a.jsonl.gz":
        assert texts[0] == "one"
    with pytest.raises(DataError, match=re.escape(name)):
        list(read_piece(Piece(str(path)), 0, BadRecords("raise"), 1000))


def test_read_piece_counts_a_gzip_file_cut_short(tmp_path):
    lines = "".join(json.dumps({"text": f"text {n * n}"}) + "\n" for n in range(9999))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode())[:-1000])
    found, bad = read([Piece(str(path))])
    assert found[0].content.text == "text 0"
    assert dict(bad.reasons) == {"damaged_file": 1}


def test_read_csv_refuses_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,response\nQ,A,B\n")
    with pytest.raises(DataError, match="two columns have the same name"):
        read([Piece(str(path))])


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_read_piece_counts_a_table_with_a_damaged_page(tmp_path, name):
    """The others of a folder are read, as with other damage."""
    table = pyarrow.table({"text": [f"text {n * n}" for n in range(2000)]})
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, path)
        data = bytearray(path.read_bytes())
        data[200:300] = b"\xff" * 100
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
        data = path.read_bytes()[:-100]
    path.write_bytes(data)
    (tmp_path / "z.jsonl").write_text('{"text": "sound"}')
    bad = BadRecords("count")
    found = list(read_documents(tmp_path, seed=0, bad=bad))
    assert found[-1].content.text == "sound"
    assert dict(bad.reasons) == {"damaged_file": 1}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_read_piece_counts_rows_of_nulls(tmp_path, name):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = [turns, None, [None], [{"role": None, "content": None}], [], turns]
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
    found, bad = read([Piece(str(path))])
    assert [d.origin.rpartition(" ")[2] for d in found] == ["1", "6"]
    assert dict(bad.reasons) == {"wrong_shape": 3, "no_answer": 1}
    assert "row 2: need the keys" in bad.messages[0]
    assert "`messages` (null)" in bad.messages[0]


def test_read_piece_names_columns_and_keys_that_change_nothing(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"text": ["a", "b"], "prompt": ["c", None], "source": ["x", "y"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    _, bad = read([Piece(str(path))])
    assert dict(bad.unused_keys) == {"prompt": 1}
    assert bad.notes == [f"{path}: columns not used: source"]


@pytest.mark.parametrize("kind", ["copies", "alone", "together"])
def test_read_parquet_holds_few_large_rows_at_a_time(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(rec, "_ROW_BYTES", 3_000_000)
    path = tmp_path / "a.parquet"
    row, rows = 1_000_000, 40
    # Copies of one text are written once, and were all held at a time.
    texts = [chr(65 + n * (kind != "copies")) * row for n in range(rows)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(
        table,
        path,
        use_dictionary=kind == "copies",
        row_group_size=1 if kind == "alone" else rows,
    )
    usual = pyarrow.default_memory_pool()
    counting = pyarrow.proxy_memory_pool(usual)
    pyarrow.set_memory_pool(counting)
    try:
        found, bad = read([Piece(str(path))], limit=900_000)
    finally:
        pyarrow.set_memory_pool(usual)
    assert (found, dict(bad.reasons)) == ([], {"too_large": rows})
    assert bad.messages[2].startswith(f"{path}, row 3: a record of 1,000,0")
    # Batches of three rows at most, with what it takes to unpack and copy them.
    assert counting.max_memory() < 12 * row
