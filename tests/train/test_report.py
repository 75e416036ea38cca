import json
import math

from taid_jax.train import report


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


def test_lines_not_finite_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = report.Lines(path, first_dropped=0)
    lines.write({"step": 1, "loss": math.nan, "kl": math.inf, "t": 0.25})
    lines.close()
    assert json.loads(path.read_text()) == {
        "step": 1,
        "loss": None,
        "kl": None,
        "t": 0.25,
    }


def test_write_json_is_strict_json(tmp_path):
    path = tmp_path / "report.json"
    report.write_json(path, {"kl_after": 0.5, "perplexity": math.inf})
    text = path.read_text()
    assert json.loads(text) == {"kl_after": 0.5, "perplexity": None}
    assert "Infinity" not in text


def test_draw_curves_makes_a_picture(tmp_path):
    path = tmp_path / "curves.png"
    rows = [{"step": i, "loss": 1 / i, "kl": 1 / i, "t": 0.1 * i} for i in range(1, 9)]
    rows[3]["kl"] = None
    report.draw_curves(
        path, rows, [{"step": 0, "kl": 2.0}, {"step": 8, "kl": 0.2}], title="a run"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
