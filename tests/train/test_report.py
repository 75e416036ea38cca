import contextlib
import json
import math
import resource

import numpy as np
import pytest

from taid_jax.train import report
from taid_jax.train.folder import WriteError


def test_lines_cuts_back_to_where_a_resumed_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    lines = report.Lines(path, first_dropped=3)
    lines.write({"step": 3, "loss": 0.5})
    lines.close()
    assert report.read_lines(path) == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": 0.5},
    ]


ODD = {"step": 1, "loss": math.nan, "kl_teacher": math.inf, "t": -math.inf, "lr": None}


def test_lines_not_finite_is_a_word_and_read_back_a_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = report.Lines(path, first_dropped=0)
    lines.write(ODD | {"skipped": True})
    lines.close()
    written = json.loads(path.read_text(), parse_constant=_refuse)
    assert written == {
        "step": 1,
        "loss": "NaN",
        "kl_teacher": "Infinity",
        "t": "-Infinity",
        "lr": None,
        "skipped": True,
    }
    (row,) = report.read_lines(path)
    np.testing.assert_equal(row, ODD | {"skipped": True})
    # A resumed run writes what it keeps anew.
    report.Lines(path, first_dropped=2).close()
    assert json.loads(path.read_text(), parse_constant=_refuse) == written


def _refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize(
    ("content", "steps", "fault"),
    [
        (b"", [], None),
        (b'{"step": 1}\n{"step": 2}\n', [1, 2], None),
        (b'{"step": 1}\n{"step": 2, "lo', [1], None),
        (b'{"step": 1}\n{"st\n{"step": 3}\n', [1], "line 2"),
        (b'{"step": 1}\n\xff\xfe\0\n{"step": 3}\n', [1], "line 2"),
        (b'{"step": 1}\n[2]\n{"step": 3}\n', [1], "line 2"),
        (b'{"step": 1}\n{"step": "2"}\n{"step": 3}\n', [1], "line 2"),
        (b'{"step": 1}\n{"kl_teacher": 2}\n{"step": 3}\n', [1], "line 2"),
        (b'{"step": 2}\n{"step": 1}\n', [2], "line 2"),
        (b'{"step": 1, "kl_teacher": [2]}\n{"step": 3}\n', [], "line 1"),
        (b"[" * 100_000 + b"\n{}\n", [], "line 1"),
    ],
)
def test_find_rows_says_where_a_file_is_damaged(tmp_path, content, steps, fault):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    rows, found = report.find_rows(path)
    assert [row["step"] for row in rows] == steps
    assert fault in found if fault else found is None
    assert report.read_lines(path) == rows


def test_find_rows_of_a_folder_is_no_traceback(tmp_path):
    rows, found = report.find_rows(tmp_path)
    assert not rows
    assert found == "is no file"


def test_lines_that_cannot_be_written_name_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = report.Lines(path, first_dropped=0)
    lines.write({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(WriteError, match=r"metrics.jsonl cannot be written: File"):
            lines.write({"step": 2, "loss": 1.5})
        with contextlib.suppress(WriteError):
            lines.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert report.read_lines(path) == [{"step": 1}]


def test_write_json_is_strict_json_and_read_back(tmp_path):
    path = tmp_path / "report.json"
    values = ODD | {"settings": {"run": {"epochs": math.inf, "name": "Nan"}}}
    report.write_json(path, values)
    written = json.loads(path.read_text(), parse_constant=_refuse)
    assert written["loss"] == "NaN"
    assert written["settings"]["run"]["epochs"] == "Infinity"
    np.testing.assert_equal(report.read_json(path), values)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (None, "-"),
        (1, "1.0"),
    ],
)
def test_number_prints_what_is_there(value, text):
    assert report.number(value, 1) == text


def test_draw_curves_makes_a_picture(tmp_path):
    path = tmp_path / "curves.png"
    rows = [
        {"step": i, "loss": 1 / i, "kl_teacher": 1 / i, "t": 0.1 * i}
        for i in range(1, 9)
    ]
    rows[3]["kl_teacher"], rows[4]["loss"], rows[5]["kl_teacher"] = (
        None,
        math.nan,
        math.inf,
    )
    judged = [
        {"step": 0, "kl_teacher": 2.0},
        {"step": 4, "kl_teacher": None},
        {"step": 8, "kl_teacher": 0.2},
    ]
    report.draw_curves(path, rows, judged, title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_draw_curves_of_nothing_finite_makes_a_picture(tmp_path, value):
    path = tmp_path / "curves.png"
    names = ("loss", "kl_teacher", "kl_teacher", "t")
    rows = [{"step": i, **dict.fromkeys(names, value)} for i in range(3)]
    report.draw_curves(path, rows, rows, title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")
