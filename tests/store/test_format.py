import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.store import format as f
from taid_jax.store import read
from taid_jax.store.read import Store


def test_log_probabilities_are_kept_to_a_quarter_of_a_thousandth():
    logprobs = -np.random.default_rng(0).exponential(4.0, 1000)
    found = f.encode_logprobs(logprobs) * -f.LOGPROB_STEP
    inside = logprobs > -31.9
    assert np.abs(found - logprobs)[inside].max() <= f.LOGPROB_STEP / 2
    # As the table says: 2.5e-4, and -32 nats at the least.
    assert f.LOGPROB_STEP / 2 < 2.5e-4
    least = f.encode_logprobs(np.array([-np.inf, -100.0, 0.0]))
    assert least.tolist() == [2**16 - 1, 2**16 - 1, 0]


def test_a_record_holds_what_was_packed():
    columns = (*f.topk_columns(3, 50), *f.hidden_columns(4, "bfloat16"))
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 50, (7, c.width)).astype(f.DTYPES[c.dtype]) for c in columns
    ]
    key = f.example_key(np.arange(7, dtype=np.int32))
    record = f.pack_record(key, arrays)
    assert len(record) == f.KEY_BYTES + 7 * sum(c.bytes_per_token for c in columns)
    found = f.unpack_record(record, key, columns)
    for column, array in zip(columns, arrays, strict=True):
        np.testing.assert_array_equal(found[column.name], array)
        assert found[column.name].dtype == array.dtype
    other = f.example_key(np.arange(8, dtype=np.int32))
    for wrong in ((record, other), (record[:-1], key)):
        with pytest.raises(f.StoreError, match="not the one that the index names"):
            f.unpack_record(*wrong, columns)


@pytest.mark.parametrize(
    ("size", "dtype"), [(2**16 - 1, "uint16"), (2**16, "uint32"), (262144, "uint32")]
)
def test_ids_have_room_for_every_vocabulary_and_for_none(size, dtype):
    column = f.topk_columns(4, size)[0]
    assert column.dtype == dtype
    assert size <= column.filler <= np.iinfo(f.DTYPES[dtype]).max
    assert jnp.asarray(np.array([column.filler], dtype)).astype(jnp.int32)[0] >= size


def _manifest():
    return f.Manifest(
        kind="hidden",
        columns=f.hidden_columns(4, "float32"),
        vocab_size=9,
        teacher="a",
        tokenizer="b",
        source="c",
        examples=1,
        tokens=2,
        shards=(f.File("outputs-00000.arrayrecord", 10, "x", 1),),
        others=(),
        made={"seq_len": 8},
    )


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    f.write_manifest(tmp_path, _manifest())
    assert f.read_manifest(tmp_path) == _manifest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "need format 1, got 2"),
        ({"tokens": 3}, "was changed after it was written"),
        ({"kind": "topk"}, "was changed after it was written"),
        (None, "cannot be read"),
    ],
)
def test_a_manifest_that_is_another_is_refused(tmp_path, change, message):
    f.write_manifest(tmp_path, _manifest())
    path = tmp_path / f.MANIFEST
    values = json.loads(path.read_text())
    text = "{" if change is None else json.dumps(values | change)
    path.write_text(text)
    with pytest.raises(f.StoreError, match=message):
        f.read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": (f.File("../x", 1, "", 1),)},
        {"others": (f.File("/etc/passwd", 1, ""),)},
        {"columns": (f.Column("teacher_hidden", "float64", 4),)},
        {"vocab_size": 0},
    ],
)
def test_a_manifest_of_what_cannot_be_is_refused_whoever_wrote_it(tmp_path, change):
    f.write_manifest(tmp_path, dataclasses.replace(_manifest(), **change))
    with pytest.raises(f.StoreError):
        f.read_manifest(tmp_path)


def test_a_record_of_another_number_of_tokens_is_not_read(
    make_store, ids_of, monkeypatch
):
    store, ids = Store(make_store("a", [0, 1])), ids_of(0)
    key = f.example_key(ids)
    assert len(store.read(ids)["teacher_ids"]) == 3
    monkeypatch.setattr(read, "example_key", lambda ids: key)
    with pytest.raises(f.StoreError, match=r"record 0 .* has 3 tokens, the example 1"):
        store.read(ids[:1])
