"""Parquet files to a store: what it holds, and each thing that is refused."""

import io
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from taid_jax.models.config import DecoderConfig
from taid_jax.models.families import write_config
from taid_jax.settings import SettingsError
from taid_jax.store.format import StoreError
from taid_jax.store.ingest import import_outputs
from taid_jax.store.read import Store


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A config and a tokenizer of 28 words; weights are not needed."""
    words = {word: number for number, word in enumerate(["<|end|>", "?"])}
    words |= {chr(97 + number): number + 2 for number in range(26)}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("teacher")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", unk_token="?"
    ).save_pretrained(folder)
    config = DecoderConfig(
        vocab_size=28,
        num_layers=1,
        tie_embeddings=True,
        d_model=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=8,
        max_position_embeddings=64,
    )
    (folder / "config.json").write_text(json.dumps(write_config(config)))
    return folder


def _row(tokens=4, entries=3, seed=0):
    """A row with the most probable of a random distribution, in no order."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, 28)) * 3
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = np.argsort(-logprobs, axis=-1)[:, :entries]
    best = rng.permuted(best, axis=-1)
    return {
        "input_ids": rng.integers(0, 28, tokens).tolist(),
        "top_ids": best.tolist(),
        "top_logprobs": np.take_along_axis(logprobs, best, -1).tolist(),
    }


def _write(path, rows, **options):
    table = pa.Table.from_pylist(rows, options.pop("schema", None))
    pyarrow.parquet.write_table(table, path, **options)
    return path


@pytest.fixture
def ingest(teacher, tmp_path):
    """`ingest(*files)`: makes the store `out` of them, and reads it."""

    def run(*files, output="out", k=3, shard_bytes=2**20, console=None):
        import_outputs(
            [pathlib.Path(file) for file in files],
            str(teacher),
            tmp_path / output,
            k=k,
            shard_bytes=shard_bytes,
            console=console or Console(quiet=True),
        )
        return Store(tmp_path / output)

    return run


def _ids(row):
    return np.array(row["input_ids"], np.int32)


def _expected(row, k):
    """Ids, log-probabilities and tails, one token after the other, in plain Python."""
    found = []
    for ids, logprobs in zip(row["top_ids"], row["top_logprobs"], strict=True):
        pairs = sorted(zip(logprobs or [], ids or [], strict=True), reverse=True)[:k]
        rest = 1 - sum(np.exp(logprob) for logprob, _ in pairs)
        found.append(
            (
                [number for _, number in pairs] + [65535] * (k - len(pairs)),
                [round(-2048 * logprob) for logprob, _ in pairs]
                + [0] * (k - len(pairs)),
                [round(-2048 * np.log(rest))],
            )
        )
    return [np.array(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("k", [2, 3, 5], ids=["fewer", "all", "more"])
def test_import_stores_the_most_probable_in_order(k, ingest, tmp_path):
    rows = [_row(tokens, seed=tokens) for tokens in (4, 7, 1)]
    store = ingest(_write(tmp_path / "a.parquet", rows), k=k)
    for row in rows:
        columns = store.read(_ids(row))
        names = ("teacher_ids", "teacher_logprobs", "teacher_tail")
        for name, wanted in zip(names, _expected(row, k), strict=True):
            np.testing.assert_array_equal(columns[name], wanted)
    assert (store.manifest.examples, store.manifest.tokens) == (3, 12)
    tails = np.concatenate([_expected(row, k)[2] for row in rows])
    assert store.manifest.mass == pytest.approx(np.mean(1 - np.exp(-tails / 2048)))
    assert store.manifest.made["imported"] == ["a.parquet"]


@pytest.mark.parametrize("nothing", [None, []], ids=["null", "empty"])
def test_import_takes_a_last_token_without_entries(nothing, ingest, tmp_path):
    row = _row()
    row["top_ids"][-1] = row["top_logprobs"][-1] = nothing
    store = ingest(_write(tmp_path / "a.parquet", [row]))
    columns = store.read(_ids(row))
    blank = store.blank((1, 1))
    for name, column in columns.items():
        np.testing.assert_array_equal(column[-1], blank[name][0, 0])
    tails = columns["teacher_tail"][:-1].astype(int)
    assert store.manifest.mass == pytest.approx(np.mean(1 - np.exp(-tails / 2048)))


def test_import_reads_what_writers_of_parquet_write(ingest, tmp_path):
    rows = [_row(seed=seed) for seed in range(5)]
    wanted = ingest(_write(tmp_path / "a.parquet", rows), output="wanted")
    schema = pa.schema(
        {
            "top_logprobs": pa.large_list(pa.list_(pa.float32())),
            "top_ids": pa.list_(pa.large_list(pa.uint16())),
            "text": pa.string(),
            "input_ids": pa.large_list(pa.uint32()),
        }
    )
    path = _write(tmp_path / "b.parquet", rows, schema=schema, row_group_size=2)
    found = ingest(path, output="found")
    for row in rows:
        one, other = wanted.read(_ids(row)), found.read(_ids(row))
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_import_counts_an_example_once_and_the_first(ingest, tmp_path):
    first, again = _row(seed=1), _row(seed=1) | {"top_ids": _row(seed=2)["top_ids"]}
    files = [
        _write(tmp_path / "a.parquet", [_row(), first]),
        _write(tmp_path / "b.parquet", [again]),
    ]
    console = Console(record=True, file=io.StringIO())
    store = ingest(*files, console=console)
    assert "1 examples come again, and count once" in console.export_text()
    assert len(store) == 2
    wanted = _expected(first, 3)[0]
    np.testing.assert_array_equal(store.read(_ids(first))["teacher_ids"], wanted)


def test_import_takes_probabilities_that_rounding_has_pushed_above_one(
    ingest, tmp_path
):
    row = {
        "input_ids": [3, 4],
        "top_ids": [[5], [6, 7]],
        "top_logprobs": [[0.0004], [-0.0002, float("-inf")]],
    }
    columns = ingest(_write(tmp_path / "a.parquet", [row])).read(_ids(row))
    assert columns["teacher_logprobs"].tolist() == [[0, 0, 0], [0, 65535, 0]]
    assert columns["teacher_tail"][0, 0] == 65535


def test_import_begins_anew_after_a_kill_and_ends_the_same(
    ingest, contents, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    rows = [_row(seed=seed) for seed in range(6)]
    path = _write(tmp_path / "a.parquet", rows)
    store = ingest(path, output="whole", shard_bytes=100)
    assert len(store.manifest.shards) == 3
    wanted = contents(tmp_path / "whole")
    assert not any("partial" in name or "done" in name for name in wanted)
    real, left = pathlib.Path.replace, -1

    def replace(self, target):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return real(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", replace)
    for count in range(100):
        output, left = f"killed-{count}", count
        try:
            ingest(path, output=output, shard_bytes=100)
        except Killed:
            left = -1
            ingest(path, output=output, shard_bytes=100)
            assert contents(tmp_path / output) == wanted
        else:
            break
    assert count > 6


def test_import_refuses_an_output_of_other_files(ingest, tmp_path):
    a = _write(tmp_path / "a.parquet", [_row()])
    b = _write(tmp_path / "b.parquet", [_row(seed=1)])
    fingerprint = ingest(a).manifest.teacher
    with pytest.raises(SettingsError, match=r"holds another store: teacher, .*sha256"):
        ingest(b)
    assert ingest(b, output="other").manifest.teacher != fingerprint
    with pytest.raises(SettingsError, match=r"k: need at most 28, .* got 29"):
        ingest(a, output="third", k=29)


def _with(place, value, column):
    """Changes one entry of a row."""

    def change(row):
        inside = row[column]
        for step in place[:-1]:
            inside = inside[step]
        inside[place[-1]] = value

    return change


def _set(**columns):
    return lambda row: row.update(columns)


WRONG_ROWS = {
    "fewer top_ids": (
        lambda row: row["top_ids"].pop(),
        "one entry for each token .* input_ids 4, top_ids 3, top_logprobs 4",
    ),
    "fewer logprobs of a token": (
        lambda row: row["top_logprobs"][1].pop(),
        "token 2 has 3 top_ids and 2 top_logprobs",
    ),
    "no tokens": (
        _set(input_ids=[], top_ids=[], top_logprobs=[]),
        "one entry for each token",
    ),
    "null row": (_set(top_ids=None), "top_ids is null"),
    "null id": (_with((2,), None, "input_ids"), "input_ids has a null"),
    "id beyond": (_with((2,), 28, "input_ids"), "has 28 at token 3, .* 0 to 27"),
    "negative id": (_with((0,), -1, "input_ids"), "has -1 at token 1"),
    "top id beyond": (
        _with((1, 2), 28, "top_ids"),
        "top_ids has 28 at token 2, .* 0 to 27",
    ),
    "top id negative": (_with((1, 2), -100, "top_ids"), "top_ids has -100 at token 2"),
    "top id twice": (
        lambda row: row["top_ids"][2].__setitem__(0, row["top_ids"][2][1]),
        "twice at token 3",
    ),
    "null top id": (_with((1, 0), None, "top_ids"), "top_ids has a null .* token 2"),
    "null logprob": (
        _with((3, 1), None, "top_logprobs"),
        "top_logprobs has a null .* token 4",
    ),
    "NaN": (_with((1, 1), float("nan"), "top_logprobs"), "got nan at token 2"),
    "above 0": (_with((1, 1), 0.01, "top_logprobs"), r"got 0\.01 at token 2"),
    "sum": (
        _set(top_logprobs=[[-0.6, -0.7, -5.0]] * 4),
        r"probabilities of token 1 add up to 1\.05",
    ),
    "nothing in the middle": (
        lambda row: (
            row["top_ids"].__setitem__(1, None),
            row["top_logprobs"].__setitem__(1, None),
        ),
        "token 2 has no top_ids; only the last",
    ),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_import_names_the_row_that_is_wrong(case, ingest, tmp_path):
    change, message = WRONG_ROWS[case]
    row = _row(seed=9)
    change(row)
    files = [
        _write(tmp_path / "a.parquet", [_row(seed=1)]),
        _write(tmp_path / "b.parquet", [_row(seed=2), row, _row(seed=3)]),
    ]
    with pytest.raises(StoreError, match=message) as caught:
        ingest(*files)
    assert str(caught.value).startswith(f"{files[1]}, row 2: ")
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "out" / "manifest.json").exists()


def _damaged(path):
    _write(path, [_row(seed=seed) for seed in range(50)], compression="none")
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)


def _cut(path):
    _write(path, [_row()])
    path.write_bytes(path.read_bytes()[:-9])


WRONG_FILES = {
    "absent": (lambda path: None, "cannot be read as Parquet: "),
    "empty": (pathlib.Path.touch, "cannot be read as Parquet: "),
    "text": (lambda path: path.write_text("a" * 99), "cannot be read as Parquet: "),
    "cut": (_cut, "cannot be read as Parquet: "),
    "damaged": (_damaged, "cannot be read after row 0: "),
    "no rows": (
        lambda path: _write(path, [], schema=pa.Table.from_pylist([_row()]).schema),
        "has no rows; leave it out",
    ),
    "a column missing": (
        lambda path: _write(path, [{"input_ids": [1], "top_ids": [[1]]}]),
        "top_logprobs needs a list of lists of numbers .*, got no such column",
    ),
    "a column of another type": (
        lambda path: _write(path, [_row() | {"top_ids": [1, 2, 3, 4]}]),
        "top_ids needs a list of lists of integers .*, got list",
    ),
    "texts for ids": (
        lambda path: _write(path, [_row() | {"input_ids": ["a", "b", "c", "d"]}]),
        "input_ids needs a list of integers .*, got list",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_import_names_the_file_that_is_wrong(case, ingest, tmp_path):
    make, message = WRONG_FILES[case]
    path = tmp_path / "b.parquet"
    make(path)
    with pytest.raises(StoreError, match=message) as caught:
        ingest(_write(tmp_path / "a.parquet", [_row()]), path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600


def test_import_needs_files(ingest):
    with pytest.raises(StoreError, match="need at least one Parquet file"):
        ingest()
