"""`taid-jax store merge | import | inspect`, on what a tiny teacher gives."""

import importlib
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from taid_jax.store.read import Store

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("teacher_ids", "teacher_logprobs", "teacher_tail")


@pytest.fixture(scope="session")
def store():
    """The command."""
    return importlib.import_module("taid_jax.cli.store").main


@pytest.fixture(scope="module")
def flags(teacher, text):
    return [
        f"--teacher={teacher}",
        f"--data={text}",
        "--batch-size=8",
        "--seq-len=64",
        "--held-out-fraction=0.3",
    ]


@pytest.fixture(scope="module")
def topk(store, flags, tmp_path_factory):
    """A store of all entries of the vocabulary: as many bytes as need three files."""
    folder = tmp_path_factory.mktemp("topk") / "store"
    options = ["--kind=topk", "--k=300", "--shard-mib=1"]
    assert store([*flags, *options, f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def hidden(store, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hidden") / "store"
    assert store([*flags, f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def examples(flags, teacher):
    """The token ids of all examples."""
    from taid_jax.cli.store import parse
    from taid_jax.models.files.tokenizer import load_tokenizer
    from taid_jax.train.inputs import read_data

    settings = parse([*flags, "--output=none"]).settings
    table = read_data(settings, load_tokenizer(teacher)).train.table
    return [table[number].ids for number in range(len(table))]


HELP = """
import sys
from taid_jax.cli import main
try:
    main(["store", sys.argv[1], "--help"])
except SystemExit as end:
    print("status", end.code)
print("modules", *sys.modules)
"""


@pytest.mark.parametrize("name", ["merge", "import", "inspect"])
def test_help_imports_nothing_that_takes_time(name):
    found = subprocess.run(
        [sys.executable, "-c", HELP, name], capture_output=True, text=True, check=True
    )
    shown, _, modules = found.stdout.rpartition("modules")
    assert "status 0" in shown
    assert f"usage: taid-jax store {name} " in shown
    assert "Exit status: 0 done" in shown
    assert not {"jax", "transformers", "pyarrow", "array_record"} & {*modules.split()}


def test_merge_of_all_parts_reads_as_the_whole(store, topk, flags, tmp_path, capsys):
    assert len(Store(topk).manifest.shards) >= 3
    parts = [tmp_path / f"{number}" for number in (1, 2)]
    options = ["--kind=topk", "--k=300", "--shard-mib=1"]
    for part in parts:
        given = [*flags, *options, f"--part={part.name}/2", f"--output={part}"]
        assert store(given) == 0
    capsys.readouterr()
    output = tmp_path / "all"
    assert store(["merge", *map(str, [output, *parts[1:]])]) == 0
    assert "of 2 parts of the job 1 are missing: 1" in capsys.readouterr().out
    assert store(["merge", *map(str, [output, *parts])]) == 2
    assert "holds another store" in capsys.readouterr().err
    output = tmp_path / "whole"
    assert store(["merge", *map(str, [output, *parts])]) == 0
    assert f"train with --teacher-store {output}" in capsys.readouterr().out
    whole, merged = Store(topk), Store(output)
    assert merged.identity() == whole.identity()
    np.testing.assert_array_equal(merged.keys, whole.keys)
    np.testing.assert_array_equal(merged.starts, whole.starts)
    for number in range(len(whole)):
        one, other = whole.columns(number), merged.columns(number)
        for name in NAMES:
            np.testing.assert_array_equal(one[name], other[name])
    one, other = whole.manifest, merged.manifest
    assert (one.examples, one.tokens) == (other.examples, other.tokens)
    assert one.mass == pytest.approx(other.mass, rel=1e-12)
    assert {**other.made, "merged": 0, "part": "1/1"} == {**one.made, "merged": 0}


@pytest.fixture(scope="module")
def parquet(teacher, examples, tmp_path_factory):
    """The twelve most probable tokens of the live teacher, in two files."""
    import jax

    from taid_jax.models.decoder import decoder_functions
    from taid_jax.models.files.load import load_model

    model = load_model(teacher)
    functions = decoder_functions(model.config)
    batch = np.zeros((len(examples), 64), np.int32)
    for row, ids in enumerate(examples):
        batch[row, : len(ids)] = ids

    @jax.jit
    def run(params, ids):
        hidden = functions.hidden(params, {"input_ids": ids})
        return jax.nn.log_softmax(functions.head(params).logits(hidden))

    logprobs = np.asarray(run(model.params, batch))[..., : model.config.vocab_size]
    best = np.argsort(-logprobs, axis=-1, kind="stable")[..., :12]
    values = np.take_along_axis(logprobs, best, -1)
    rows = [
        {
            "input_ids": ids.tolist(),
            "top_ids": best[row, : len(ids)].tolist(),
            "top_logprobs": values[row, : len(ids)].tolist(),
        }
        for row, ids in enumerate(examples)
    ]
    folder = tmp_path_factory.mktemp("parquet")
    files = [folder / "a.parquet", folder / "b.parquet"]
    for file, some in zip(files, (rows[:5], rows[5:]), strict=True):
        pyarrow.parquet.write_table(pa.Table.from_pylist(some), file)
    return files


def test_import_equals_what_the_live_teacher_stores(
    store, parquet, flags, examples, teacher, tmp_path, capsys
):
    assert store([*flags, "--kind=topk", "--k=8", f"--output={tmp_path / 'a'}"]) == 0
    given = [f"--teacher={teacher}", "--k=8", f"--output={tmp_path / 'b'}"]
    assert store(["import", *map(str, parquet), *given]) == 0
    assert f"--teacher-store {tmp_path / 'b'}" in capsys.readouterr().out.replace(
        "\n", " "
    )
    live, imported = Store(tmp_path / "a"), Store(tmp_path / "b")
    for ids in examples:
        one, other = live.read(ids), imported.read(ids)
        np.testing.assert_array_equal(one["teacher_ids"], other["teacher_ids"])
        for name in NAMES[1:]:
            # A step of fixed point: rows of another batch, and 1 - P for the others.
            away = one[name].astype(int) - other[name].astype(int)
            assert abs(away).max() <= 1
    one, other = live.manifest, imported.manifest
    for name in ("kind", "columns", "vocab_size", "tokenizer", "source"):
        assert getattr(one, name) == getattr(other, name)
    # Each example once, however often it comes in the rows of a run.
    distinct = {ids.tobytes(): live.read(ids)["teacher_tail"] for ids in examples}
    tails = np.concatenate([*distinct.values()]).astype(int)
    assert other.mass == pytest.approx(1 - np.exp(-tails / 2048).mean(), abs=1e-3)
    config = pathlib.Path("teacher") / "config.json"
    for name in (config, config.with_name("tokenizer.json")):
        assert (live.folder / name).read_bytes() == (
            imported.folder / name
        ).read_bytes()


def test_tools_refuse_bad_input_in_one_line(
    store, topk, hidden, teacher, tmp_path, capsys
):
    output = str(tmp_path / "out")
    cases = [
        (["merge", output, str(topk), str(hidden)], "do not belong together"),
        (["merge", output], "need at least one store"),
        (["merge", output, str(teacher)], "holds no stored teacher"),
        (["inspect", str(teacher)], "holds no stored teacher"),
        (
            ["import", f"{ROOT}/README.md", f"--teacher={teacher}", "--output=x"],
            "cannot be read as Parquet",
        ),
        (["import", "x", "--teacher=t", "--output=x", "--k=0"], "k: need 1 <= k"),
        (["import", "--teacher=t", "--output=x"], "need at least one Parquet file"),
    ]
    for words, message in cases:
        assert store(words) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "x", "--tokens=-1"],
        ["merge"],
    ],
    ids=lambda words: words[0],
)
def test_tools_refuse_bad_flags(store, words, capsys):
    with pytest.raises(SystemExit) as caught:
        store(words)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_merge_that_cannot_write_ends_with_one_line(
    store, topk, tmp_path, capsys, monkeypatch
):
    from taid_jax.store import merge

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge.os, "link", full)
    monkeypatch.setattr(merge.shutil, "copyfile", full)
    assert store(["merge", str(tmp_path / "out"), str(topk)]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert said.count("\n") == 1


def _favourites(shown):
    """Pairs of token and probability, of all rows."""
    return re.findall(r"'((?:[^'\\]|\\.)*)' (0\.\d+|1\.000)", shown)


def test_inspect_shows_the_same_favourites_of_each_kind(
    store, topk, hidden, flags, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    shown = {}
    for folder in (topk, hidden):
        assert store(["inspect", str(folder), "--tokens=6"]) == 0
        shown[folder] = capsys.readouterr().out
        about = Store(folder).manifest
        for part in (about.source, f"{about.examples:,}", f"{about.tokens:,} of"):
            assert part in shown[folder]
        assert "seq_len" in shown[folder]
    found = [_favourites(text) for text in shown.values()]
    assert len(found[0]) == len(found[1]) == 6 * 5
    for (one, p), (other, q) in zip(*found, strict=True):
        assert one == other
        assert float(p) == pytest.approx(float(q), abs=2e-3)
    # All of the vocabulary is stored.
    assert "1% 1.0000  5% 1.0000" in shown[topk]
    assert "quantiles" not in shown[hidden]


def test_inspect_knows_mass_and_draws(store, flags, parquet, teacher, tmp_path, capsys):
    imported, drawn = tmp_path / "imported", tmp_path / "drawn"
    given = [f"--teacher={teacher}", "--k=4", f"--output={imported}"]
    assert store(["import", *map(str, parquet), *given]) == 0
    assert store([*flags, "--kind=topk", "--sampled=20", f"--output={drawn}"]) == 0
    capsys.readouterr()
    assert store(["inspect", str(imported), "--tokens=0"]) == 0
    shown = capsys.readouterr().out
    opened = Store(imported)
    every = [opened.columns(number)["teacher_tail"] for number in range(len(opened))]
    masses = 1 - np.exp(-np.concatenate(every).astype(np.float64) / 2048)
    for percent in (1, 5, 25, 50, 75, 95):
        value = np.percentile(masses, percent)
        assert f"{percent}% {value:.4f}" in " ".join(shown.split())
    assert not _favourites(shown)
    assert store(["inspect", str(drawn), "--tokens=3"]) == 0
    shown = capsys.readouterr().out
    assert "20 of each token" in shown
    # Twentieths, the largest first.
    values = [float(p) * 20 for _, p in _favourites(shown)]
    assert values
    assert all(value == round(value) for value in values)


def test_inspect_verify_names_each_wrong_file(store, topk, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(topk, tmp_path / "copy")
    assert store(["inspect", str(folder), "--verify", "--tokens=0"]) == 0
    assert "all files are as they were written" in capsys.readouterr().out
    shards = sorted(folder.glob("outputs-*"))
    data = bytearray(shards[0].read_bytes())
    data[len(data) // 2] ^= 1
    shards[0].write_bytes(data)
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    shards[2].unlink()
    assert store(["inspect", str(folder), "--verify"]) == 2
    errors = capsys.readouterr().err.splitlines()
    wanted = ("has other contents than", "bytes; manifest.json says", "is missing")
    assert len(errors) == 3
    for shard, message, error in zip(shards, wanted, errors, strict=False):
        assert str(shard) in error
        assert message in error


def test_row_of_an_inference_server_is_about_the_next_token():
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "store.md").read_text(), re.S
    )
    names = {}
    exec(block, names)
    entry = types.SimpleNamespace
    output = entry(
        prompt_token_ids=[7, 8, 9],
        prompt_logprobs=[
            None,
            {8: entry(logprob=-0.5, rank=1), 3: entry(logprob=-1.5, rank=2)},
            {4: entry(logprob=-0.1, rank=1), 9: entry(logprob=-9.0, rank=70)},
        ],
    )
    assert names["to_row"](output) == {
        "input_ids": [7, 8, 9],
        "top_ids": [[8, 3], [4, 9], []],
        "top_logprobs": [[-0.5, -1.5], [-0.1, -9.0], []],
    }
