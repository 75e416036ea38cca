import csv
import io
import json

import pytest

from taid_jax.cli import _comparison as cp
from taid_jax.cli.compare import METHODS
from taid_jax.recipes import read_recipe
from taid_jax.settings import SettingsError, flatten, read_settings


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "shared.yaml"
    path.write_text("steps: 5\nbatch_size: 8\nt_start: 0.2\n")
    return path


@pytest.fixture
def plan(config, tmp_path):
    def make(methods=("rkl", "taid"), seeds=(0, 1), **overrides):
        return cp.plan_cells(config, methods, seeds, tmp_path / "out", overrides)

    return make


def _finish(cell, kl, **values):
    cell.prepare()
    cell.run.mkdir()
    report = {"kl_before": 2.0 + cell.seed, "kl_after": kl, "tokens_per_second": 100.0}
    (cell.run / "report.json").write_text(json.dumps(report | values))
    rows = [{"step": 0, "kl_teacher": 2.0 + cell.seed}, {"step": 5, "kl_teacher": kl}]
    (cell.run / "evaluations.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )


def test_plan_cells_of_one_seed_stand_together(plan):
    cells = plan(steps=7)
    names = [cell.folder.name for cell in cells]
    assert names == ["rkl-seed0", "taid-seed0", "rkl-seed1", "taid-seed1"]
    for cell in cells:
        assert cell.settings.run.seed == cell.seed
        assert cell.settings.run.steps == 7
        assert cell.settings.data.batch_size == 8
        assert cell.settings.run.output == str(cell.run)
    assert cells[0].settings.objective.objective == "reverse_kl"
    assert cells[1].settings.objective.t_start == 0.2


def test_plan_cells_takes_a_path_for_a_method(plan, tmp_path):
    (tmp_path / "mine.yaml").write_text("objective: dkd\n")
    (cell,) = plan([str(tmp_path / "mine.yaml")], [3])
    assert cell.folder.name == "mine-seed3"
    assert cell.settings.objective.objective == "dkd"


def test_plan_cells_of_one_name_are_refused(plan, tmp_path):
    path = tmp_path / "taid.yaml"
    path.write_text("objective: dkd\n")
    with pytest.raises(SettingsError, match=r"methods: taid and .*yaml are both"):
        plan(["taid", str(path)])
    assert len(plan(["taid", "taid"], [0])) == 1


def test_plan_cells_unknown_method_names_those_there_are(plan):
    with pytest.raises(SettingsError, match=r"method: need .*rkl.*taid.*'nothing'"):
        plan(["nothing"])


def test_plan_cells_of_a_pair_are_its_recipes(plan, tmp_path):
    cells = cp.plan_cells(None, METHODS, [0], tmp_path / "pair", {}, "zephyr_pythia")
    for cell in cells:
        recipe = flatten(read_recipe(pair="zephyr_pythia", method=cell.method))
        assert flatten(cell.settings) == recipe | {"run.output": str(cell.run)}


def test_cell_with_other_settings_is_refused(plan):
    plan()[0].prepare()
    assert plan()
    with pytest.raises(
        SettingsError, match=r"(?s)rkl-seed0.*run.steps: 5 there, now 6"
    ):
        plan(steps=6)


def test_cell_prepare_writes_settings_and_resumes_whatever_is_there(plan):
    cell = plan()[0]
    assert cell.prepare() == [f"--config={cell.file}", "--resume"]
    assert read_settings(cell.file) == cell.settings
    # Cut off before the first checkpoint: the run begins anew by itself.
    (cell.run / "checkpoints").mkdir(parents=True)
    assert cell.prepare() == [f"--config={cell.file}", "--resume"]
    assert cell.run.exists()


def test_collect_and_make_table_over_seeds(plan):
    cells = plan()
    assert cp.collect(cells) == {}
    _finish(cells[0], 1.0, peak_memory_bytes=2**30, rouge_l_after=0.25)
    _finish(cells[1], 0.5)
    _finish(cells[2], 2.0, peak_memory_bytes=2**31, rouge_l_after=0.75)
    rows = cp.collect(cells)
    # Not finished: taid with seed 1. The start is that of each seed, taken once.
    assert rows == {
        "before training": {"KL (nats)": [2.0, 3.0]},
        "rkl": {
            "KL (nats)": [1.0, 2.0],
            "ROUGE-L": [0.25, 0.75],
            "tokens/s": [100.0, 100.0],
            "memory (GiB)": [1.0, 2.0],
        },
        "taid": {"KL (nats)": [0.5], "tokens/s": [100.0]},
    }
    assert cp.make_table(rows).splitlines() == [
        "| method | seeds | KL (nats) | ROUGE-L | tokens/s | memory (GiB) |",
        "|---|---:|---:|---:|---:|---:|",
        "| before training | 2 | 2.5000 ± 0.7071 |  |  |  |",
        "| rkl | 2 | 1.5000 ± 0.7071 | 0.5000 ± 0.3536 | 100 ± 0 | 1.50 ± 0.71 |",
        "| taid | 1 | 0.5000 |  | 100 |  |",
    ]


def test_table_says_of_how_many_seeds_a_figure_is(plan):
    cells = plan(["rkl"])
    _finish(cells[0], 1.0, kl_reverse_after=0.5)
    _finish(cells[1], 1.0, kl_reverse_after=0.5, distinct_2_after=0.25)
    table = cp.make_table(cp.collect(cells)).splitlines()
    assert "| reverse KL (nats) | distinct-2 |" in table[0]
    assert "| 0.5000 ± 0.0000 | 0.2500 (of 1) |" in table[3]


def test_make_csv_has_a_row_for_every_cell(plan):
    cells = plan(seeds=(0,))
    _finish(cells[0], "NaN", calibration_error_after=0.125, notes=["a"], data={"b": 1})
    assert cp.make_csv(cells) == (
        "method,seed,kl_before,kl_after,tokens_per_second,calibration_error_after\r\n"
        "rkl,0,2.0,nan,100.0,0.125\r\n"
        "taid,0,,,,\r\n"
    )
    _finish(cells[1], 1.0, rouge_l_after=0.5)
    *_, row = csv.DictReader(io.StringIO(cp.make_csv(cells), newline=""))
    assert row["method"] == "taid"
    assert row["rouge_l_after"] == "0.5"
    assert row["calibration_error_after"] == ""


def test_make_csv_quotes_a_name(plan, tmp_path):
    (tmp_path / 'a,"b.yaml').write_text("objective: dkd\n")
    cells = plan([str(tmp_path / 'a,"b.yaml')], [3])
    (row,) = csv.DictReader(io.StringIO(cp.make_csv(cells), newline=""))
    assert row == {"method": 'a,"b', "seed": "3"}


def test_draw_makes_a_picture(plan, tmp_path):
    cells = plan()
    for number, cell in enumerate(cells[:3]):
        _finish(cell, 1.0 + number, rouge_l_before=0.1, rouge_l_after=0.2)
    path = tmp_path / "picture.png"
    cp.draw(cells, path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "text"), [("NaN", "nan"), ("Infinity", "inf"), ("-Infinity", "-inf")]
)
def test_table_and_picture_show_what_is_not_finite(plan, tmp_path, value, text):
    cells = plan(["rkl"])
    _finish(cells[0], 1.0, student_perplexity_after=9.0)
    _finish(cells[1], value, student_perplexity_after="Infinity")
    table = cp.make_table(cp.collect(cells)).splitlines()
    assert table[3].startswith(f"| rkl | 2 | {text} | inf |")
    cp.draw(cells, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()
