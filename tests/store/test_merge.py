"""Stores that are joined: what they hold, what is refused, and what a kill leaves."""

import errno
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest

from taid_jax.settings import SettingsError
from taid_jax.store import merge as module
from taid_jax.store.format import StoreError
from taid_jax.store.merge import merge_stores
from taid_jax.store.read import Store
from taid_jax.train.folder import WriteError


class Killed(BaseException):
    """Stands for the end of the process."""


def merge(output, parts):
    """The manifest of the joined store, and what a user is told."""
    said = []
    return merge_stores(output, parts, said.append), said


def _same(one, other, ids, start=0):
    found = one.read(ids, start), other.read(ids, start)
    assert found[0].keys() == found[1].keys()
    for name, column in found[0].items():
        np.testing.assert_array_equal(column, found[1][name])


@pytest.mark.parametrize("kind", ["topk", "hidden"])
def test_merge_has_what_the_whole_has(kind, make_store, make_parts, ids_of, tmp_path):
    whole = make_store("whole", list(range(9)), kind=kind)
    manifest, said = merge(tmp_path / "all", make_parts(3, (1, 2, 3), kind=kind))
    one, other = Store(whole), Store(tmp_path / "all")
    for number in range(9):
        _same(one, other, ids_of(number))
    assert not said
    assert (manifest.examples, manifest.tokens) == (9, one.manifest.tokens)
    if kind == "topk":
        assert manifest.mass == pytest.approx(one.manifest.mass, rel=1e-12)
    assert "part" not in manifest.made
    assert manifest.made["seq_len"] == 16
    assert [piece["store"] for piece in manifest.made["merged"]] == [
        *("part-1", "part-2", "part-3")
    ]


def test_merge_stands_when_the_parts_are_gone(make_parts, ids_of, contents, tmp_path):
    parts = make_parts(2, (1, 2))
    merge(tmp_path / "all", parts)
    before = contents(tmp_path / "all")
    assert not any(name.endswith((".partial", ".json.done")) for name in before)
    for part in parts:
        shutil.rmtree(part)
    store = Store(tmp_path / "all")
    assert store.read(ids_of(5))["teacher_ids"].shape == (4, 3)
    assert contents(tmp_path / "all") == before


def test_merge_says_which_parts_are_missing(make_parts, tmp_path):
    parts = make_parts(5, (2, 4))
    manifest, said = merge(tmp_path / "all", parts)
    assert said == ["note: of 5 parts of the job 3 are missing: 1, 3, 5"]
    assert manifest.made["part"] == "2/5 and 4/5"
    # What was joined can be joined again, with what was missing.
    rest = make_parts(5, (1, 3, 5))
    manifest, said = merge(tmp_path / "more", [tmp_path / "all", *rest])
    assert not said
    assert "part" not in manifest.made
    assert len(manifest.made["merged"]) == 5


def test_merge_counts_an_example_once_and_the_first(make_store, ids_of, tmp_path):
    a = make_store("a", [0, 1, 2])
    b = make_store("b", [3, 1, 0], seed=1)
    manifest, said = merge(tmp_path / "all", [a, b])
    assert said == ["note: 2 examples come again in a later part, and count once"]
    one, other, store = Store(a), Store(b), Store(tmp_path / "all")
    for number in range(3):
        _same(one, store, ids_of(number))
    _same(other, store, ids_of(3))
    tokens = {number: len(ids_of(number)) for number in range(4)}
    assert (manifest.examples, manifest.tokens) == (4, sum(tokens.values()))
    tails = [store.read(ids_of(number))["teacher_tail"] for number in range(4)]
    steps = np.concatenate(tails).astype(np.float64)
    assert manifest.mass == pytest.approx(np.mean(1 - np.exp(-steps / 2048)))


def test_merge_keeps_an_example_at_each_of_its_places(make_store, ids_of, tmp_path):
    a = make_store("a", [0, 1], starts=(0, 4))
    b = make_store("b", [0], starts=(7,), seed=1)
    manifest, said = merge(tmp_path / "all", [a, b])
    assert not said
    assert manifest.examples == 3
    store = Store(tmp_path / "all")
    _same(Store(a), store, ids_of(0), 0)
    _same(Store(b), store, ids_of(0), 7)


def test_merge_gives_files_of_one_name_another(make_store, ids_of, tmp_path):
    a, b = make_store("a", [0, 1, 2, 3]), make_store("b", [4, 5, 6])
    manifest, _ = merge(tmp_path / "all", [a, b])
    assert [file.name for file in manifest.shards] == [
        f"outputs-{number:05}.arrayrecord" for number in range(4)
    ]
    store = Store(tmp_path / "all")
    for number in range(7):
        _same(Store(a if number < 4 else b), store, ids_of(number))


def test_merge_takes_a_part_without_examples(make_store, tmp_path):
    parts = [make_store("a", []), make_store("b", [1])]
    manifest, _ = merge(tmp_path / "all", parts)
    assert manifest.examples == 1


@pytest.mark.parametrize("links", [True, False], ids=["linked", "copied"])
def test_merge_goes_on_after_any_kill(
    links, make_parts, contents, tmp_path, monkeypatch
):
    parts = make_parts(2, (1, 2), kind="hidden")
    before = [contents(part) for part in parts]
    real = {"link": os.link, "replace": pathlib.Path.replace}
    left = -1

    def act(name):
        def run(*arguments, **options):
            nonlocal left
            if name == "link" and not links:
                raise OSError(errno.EXDEV, "another disk")
            if left == 0:
                raise Killed
            left -= 1
            return real[name](*arguments, **options)

        return run

    monkeypatch.setattr(os, "link", act("link"))
    monkeypatch.setattr(pathlib.Path, "replace", act("replace"))
    merge(tmp_path / "whole", parts)
    wanted = contents(tmp_path / "whole")
    for count in range(100):
        output, left = tmp_path / f"killed-{count}", count
        try:
            merge(output, parts)
        except Killed:
            left = -1
            # A link that was not renamed is the part's own file.
            merge(output, parts)
            assert contents(output) == wanted
        else:
            break
    assert count > 8
    assert [contents(part) for part in parts] == before
    linked = (tmp_path / "whole" / "head.safetensors").stat().st_nlink > 1
    assert linked == links


def test_merge_that_is_done_is_left_alone(make_parts, contents, tmp_path):
    parts = make_parts(2, (1, 2))
    merge(tmp_path / "all", parts)
    before = (tmp_path / "all" / "manifest.json").stat().st_mtime_ns
    merge(tmp_path / "all", parts)
    assert (tmp_path / "all" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher": "u" * 64}, "teacher"),
        ({"tokenizer": "l" * 64}, "tokenizer"),
        ({"vocab_size": 49}, "vocab_size"),
        ({"kind": "hidden"}, "kind"),
    ],
    ids=lambda change: str(change),
)
def test_merge_refuses_what_does_not_belong(change, named, make_store, tmp_path):
    a, b = make_store("a", [0]), make_store("b", [1], **change)
    with pytest.raises(StoreError, match=f"(?s)differ in {named} ") as caught:
        merge(tmp_path / "all", [a, b])
    assert str(a) in str(caught.value)
    assert str(b) in str(caught.value)
    assert not (tmp_path / "all").exists()


def test_merge_refuses_another_head(make_store, tmp_path):
    a = make_store("a", [0], kind="hidden")
    b = make_store("b", [1], kind="hidden", source="as/float32")
    with pytest.raises(StoreError, match=r"differ in head\.safetensors"):
        merge(tmp_path / "all", [a, b])


def test_merge_refuses_an_output_of_something_else(make_store, tmp_path):
    a, b = make_store("a", [0]), make_store("b", [1])
    for output in (a, b):
        with pytest.raises(SettingsError, match="holds another store"):
            merge(output, [a, b])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("a year")
    with pytest.raises(SettingsError, match=r"not empty \(it has 'thesis.txt'\)"):
        merge(tmp_path / "mine", [a, b])
    with pytest.raises(SettingsError, match="need at least one store"):
        merge(tmp_path / "all", [])
    with pytest.raises(StoreError, match="holds no stored teacher"):
        merge(tmp_path / "all", [a, tmp_path / "mine"])
    merge(tmp_path / "all", [a, b])
    with pytest.raises(SettingsError, match="holds another store: merged differ"):
        merge(tmp_path / "all", [b, a])


def test_merge_names_a_part_that_is_damaged(make_store, tmp_path, monkeypatch):
    a, b = make_store("a", [0, 1]), make_store("b", [2, 3])
    shard = b / "outputs-00000.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # In the end that nobody reads who knows the place of a record.
    shard.write_bytes(data)

    def far(*_):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", far)
    with pytest.raises(StoreError, match=re.escape(f"{shard}")):
        merge(tmp_path / "all", [a, b])
    assert not (tmp_path / "all" / "manifest.json").exists()


def test_merge_says_what_cannot_be_written(make_parts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    parts = make_parts(2, (1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        patch.setattr(module.shutil, "copyfile", full)
        with pytest.raises(WriteError, match=r"No space left .* the same command goes"):
            merge(tmp_path / "all", parts)
    manifest, _ = merge(tmp_path / "all", parts)
    assert manifest.examples == 6
    assert json.loads((tmp_path / "all" / "manifest.json").read_text())["version"] == 1
