"""Settings of untrusted files: types, bounds, and nothing overlooked."""

import os

import pytest

from taid_jax.errors import ModelError
from taid_jax.models.families.fields import REQUIRED, Fields, read_json


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, True),
        (int, 2.0),
        (int, "2"),
        (int, -1),
        (int, 10**30),
        (int, [2]),
        (float, float("nan")),
        (float, float("inf")),
        (float, 10**400),
        (float, False),
        (bool, 1),
        (bool, "true"),
        (str, 5),
        (str, True),
    ],
)
def test_get_refuses_other_types_and_sizes(kind, value):
    fields = Fields({"key": value}, "file")
    fields.get("key", REQUIRED, kind)
    with pytest.raises(ModelError, match=r"file asks for .* key: need "):
        fields.finish()


def test_finish_lists_all_problems_together():
    fields = Fields({"a": "no", "b": 1, "unknown": 1, "inner": {"x": []}}, "file")
    fields.get("a", REQUIRED, int)
    fields.get("missing", REQUIRED, int)
    fields.only("b", (2, 3))
    inner = fields.section("inner")
    assert inner is not None
    inner.get("x", 1.0, float)
    with pytest.raises(ModelError) as caught:
        fields.finish()
    for words in (
        "a: need",
        "missing: is missing",
        "b: the decoder",
        "unknown: is not",
    ):
        assert words in str(caught.value)
    assert "inner.x: need a number" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}}'),
        *(b'{"a": NaN}', b'{"a": [-Infinity]}', b'{"a": 1, "a": 1}'),
        b'{"b": {"' + b"x" * 9999 + b'": 1, "' + b"x" * 9999 + b'": 2}}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a":' * 100_000,
    ],
    ids=[
        *("empty", "cut", "list", "number", "binary", "deep", "trailing"),
        *("nan", "infinity", "twice", "twice-inside", "digits", "deep-objects"),
    ],
)
def test_read_json_refuses_what_is_no_object(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        read_json(path)
    assert len(str(caught.value)) < 600


def test_read_json_refuses_what_never_ends(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match="is no file"):
        read_json(tmp_path / "config.json")
