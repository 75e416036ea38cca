"""Small stores without a model: records of random numbers."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest

VOCAB = 50


def example(number, tokens=5):
    """Token ids of an example, its own."""
    rng = np.random.default_rng(number)
    return rng.integers(0, VOCAB, tokens).astype(np.int32)


@pytest.fixture
def make_store(tmp_path):
    """`make_store(name, numbers)`: a store of these examples, two in a file."""
    from taid_jax.store.folder import Sink, begin_store, finish_store, tidy
    from taid_jax.store.format import (
        DTYPES,
        HEAD,
        example_key,
        hidden_columns,
        topk_columns,
    )

    def make(name, numbers, *, kind="topk", seed=0, first=0, starts=(), **changes):
        folder = tmp_path / name
        columns = (
            topk_columns(3, VOCAB) if kind == "topk" else hidden_columns(4, "float32")
        )
        facts = {
            "kind": kind,
            "columns": [dataclasses.asdict(column) for column in columns],
            "vocab_size": VOCAB,
            "teacher": "t" * 64,
            "tokenizer": "k" * 64,
            "source": "some/teacher",
            "draws": None,
            "made": {"data": "texts", "seq_len": 16, "part": "1/1"},
        } | changes
        files, entries, tokens, mass = [], [], 0, 0.0
        with contextlib.ExitStack() as hold:
            begin_store(folder, facts, hold)
            for start in range(0, len(numbers), 2):
                number = first + start // 2
                with Sink(folder / f"outputs-{number:05}.arrayrecord", kind) as sink:
                    for record, which in enumerate(numbers[start : start + 2]):
                        ids = example(which, tokens=3 + which % 4)
                        rng = np.random.default_rng((seed, which))
                        sink.write(
                            ids,
                            [
                                rng.integers(0, 40, (len(ids), column.width)).astype(
                                    DTYPES[column.dtype]
                                )
                                for column in columns
                            ],
                        )
                        place = starts[start + record] if starts else 0
                        entries.append((example_key(ids), len(files), record, place))
                files.append(sink.file)
                tokens += sink.tokens
                mass += sink.mass
            (folder / "teacher").mkdir()
            (folder / "teacher" / "config.json").write_text(json.dumps({"a": 1}))
            if kind == "hidden":
                head = changes.get("source", "some/teacher").encode()
                (folder / HEAD).write_bytes(head)
            finish_store(folder, facts, entries, files, tokens, mass)
            tidy(folder)
        return folder

    return make


@pytest.fixture
def make_parts(make_store):
    """`make_parts(total, some)`: parts of one job over nine examples, by number."""

    def make(total, some, **changes):
        made = {"data": "texts", "seq_len": 16}
        return [
            make_store(
                f"part-{n}",
                list(range(3 * (n - 1), 3 * n)),
                first=10 * n,
                made={**made, "part": f"{n}/{total}"},
                **changes,
            )
            for n in some
        ]

    return make


def bytes_of(folder):
    """All files of a folder but its lock, by their names."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def contents():
    """`contents(folder)`: the bytes of all files but the lock, by their names."""
    return bytes_of


@pytest.fixture
def ids_of():
    """`ids_of(number)`: the token ids of an example of `make_store`."""
    return lambda number: example(number, tokens=3 + number % 4)
