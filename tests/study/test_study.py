import importlib
import json
import math
import pathlib

import numpy as np
import pytest

from taid_jax.cli import _study, study
from taid_jax.study.figures import Results, choose_rates, interval
from taid_jax.study.page import LANGUAGE, PICTURES, make_page, result_files
from taid_jax.study.plan import EQUAL_TIME, FULL, QUICK, Plan, Size
from taid_jax.study.texts import write_texts


def made_up(shift):
    """Results in which each method is its shift above SFT, in the same noise."""
    plan = Plan(
        teachers={"middle": (Size(1, 32, 1), 1e-3), "large": (Size(2, 32, 1), 1e-3)},
        students={"small": Size(1, 16, 1)},
        methods=tuple(shift),
        everywhere=("sft",),
        variants=(),
        budgets=(10,),
        middle_steps=20,
    )
    rates = dict.fromkeys(shift, 1e-3)
    runs = plan.runs(rates, 2.0)
    noise = np.random.default_rng(0).normal(0, 0.1, 5)
    records = [
        {
            **run._asdict(),
            "figures": {
                "cross_entropy": 3 + noise[run.seed % 5] + shift.get(run.method, 0),
                "teacher_cross_entropy": 2.0,
                "kl_teacher": 0.5,
            },
            "seconds": 1.0,
            "diverged": False,
        }
        for run in (*plan.tuning(), *runs)
    ]
    return plan, records


def test_interval_is_students_t():
    found = interval([1.0, 2.0, 4.0])
    # From a table: t(0.975, 2) = 4.303.
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(
        4.3027 * np.std([1, 2, 4], ddof=1) / 3**0.5, 1e-4
    )
    assert found.sign == 0
    assert interval([-1.0, -1.1, -1.05]).sign == -1
    assert interval([5.0]).half == math.inf
    assert interval([5.0]).sign == 0


def test_differences_are_of_runs_of_one_seed():
    _, records = made_up({"sft": 0.0, "forward_kl": 0.02})
    results = Results(records)
    same = {"budget": 10, "teacher": "middle"}
    one, other = ({**same, "method": m} for m in ("forward_kl", "sft"))
    found = results.difference("cross_entropy", one, other)
    # Far less than the noise of a seed, which both have.
    assert found is not None
    assert found.sign == 1
    assert found.mean == pytest.approx(0.02)
    assert found.number == 5
    del records[
        next(
            i for i, r in enumerate(records) if r["method"] == "sft" and not r["tuning"]
        )
    ]
    found = Results(records).difference("cross_entropy", one, other)
    assert found is not None
    assert found.number == 4


def test_choose_rates_takes_the_lowest_and_no_nan():
    tuning = [
        {"method": method, "learning_rate": rate, "figures": {"cross_entropy": value}}
        for method, rate, value in (
            ("sft", 1e-3, 3.0),
            ("sft", 3e-3, 2.5),
            ("sft", 6e-3, math.nan),
            ("dkd", 1e-3, math.nan),
            ("dkd", 1e-2, None),
            ("dkd", 3e-3, 4.0),
        )
    ]
    tuning.append({"method": "dkd", "learning_rate": 2e-3, "figures": {}})  # Diverged.
    assert choose_rates(tuning, "cross_entropy") == {"sft": 3e-3, "dkd": 3e-3}


def test_plan_runs_nothing_twice_and_tunes_what_has_no_rate():
    rates = dict.fromkeys(FULL.methods, 1e-3)
    runs = FULL.runs(rates, 2.5)
    names = [run.name for run in (*runs, *FULL.tuning())]
    assert len({*names}) == len(names)
    longer = [run for run in runs if run.method == EQUAL_TIME]
    assert {(run.budget, run.steps) for run in longer} == {(100, 250), (1000, 2500)}
    # Whole seeds, so that a study that is not finished has all tables of its pair.
    order = [(run.student == "larger", run.seed) for run in runs]
    first = [each for each in order if each[1] < 3]
    assert order == [*sorted(first), *sorted(each for each in order if each[1] > 2)]
    # Without a teacher it is one run for each student, whatever the teachers are.
    alone = [run for run in runs if run.method == "sft" and run.student != FULL.pair[1]]
    assert {run.student for run in alone} == {"larger"}
    assert len(alone) == len(FULL.seeds_elsewhere)
    assert not list(QUICK.tuning())
    assert {run.tuning for run in FULL.tuning()} == {True}


def test_texts_keep_what_is_judged_by_from_the_choice_of_rates(tmp_path):
    sources = tmp_path / "lib"
    (sources / "inner").mkdir(parents=True)
    for number in range(40):
        text = f"number = {number}\n" * 50
        (sources / f"m{number}.py").write_text(text)
        (sources / "inner" / f"m{number}.py").write_text(f"# inner\n{text}")
    (sources / "empty.py").write_text("")
    (sources / "bytes.py").write_bytes(b"\xff" * 1000)
    found = write_texts(sources, tmp_path)
    assert found["documents"]["teacher"] == 80
    assert found["documents"]["student"] == 40
    # A tenth, by hash, is judged by.
    assert 30 < found["documents"]["tuning"] < 40
    assert write_texts(sources, tmp_path) == found


def test_page_says_what_is_noise_and_what_is_not(tmp_path):
    plan, records = made_up({"sft": 0.0, "forward_kl": -0.5, "reverse_kl": 0.25})
    rng = np.random.default_rng(1)
    for each in records:
        each["figures"]["kl_teacher"] += rng.normal(0, 0.1)
    counted = [r for r in records if r["method"] == "reverse_kl" and not r["tuning"]]
    del counted[0]["figures"]["kl_teacher"]
    values = {
        "machine": {"processor": "P", "cores": 2, "python": "3", "jax": "0"},
        "plan": plan.__dict__,
        "texts": {
            "sha256": "a" * 64,
            "documents": {"teacher": 9, "student": 5, "tuning": 4},
            "characters": {"teacher": 900, "student": 500, "tuning": 400},
        },
        "teachers": {
            name: {"layers": 1, "width": 32, "tokens": 100, "learning_rate": 1e-3}
            for name in plan.teachers
        },
        "step_seconds": {"sft": 0.01, "stored": 0.02, "live": 0.03},
        "rates": dict.fromkeys(plan.methods, 1.5e-3),
        "runs": records,
        "planned": len(records) + 1,
        "seconds": 60.0,
    }
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / LANGUAGE).write_text(json.dumps(values))
    page = make_page(folder)
    assert "| forward_kl | **-0.500 ± 0.000** better |" in page
    assert "| reverse_kl | **+0.250 ± 0.000** worse |" in page
    assert " noise |" in page
    assert page.count(" (of 4) |") == 3  # The mean, and a difference in two tables.
    verdict = "| 10 | sft | better: `forward_kl`; worse: `reverse_kl`; within noise: "
    assert verdict in page
    assert "| 10 | forward_kl | worse: `sft`, `reverse_kl`, `sft, equal time` |" in page
    assert "an end of the grid for sft, forward_kl, reverse_kl." in page
    assert "3.0 times as many steps" in page
    assert f"So far {len(records)} of {len(records) + 1} runs are finished" in page
    # The best student has 2.4 to 2.6 nats, the teacher 2.
    assert "| large | 1 of 32 | 0.0 M | 0.001 |" in page
    assert (folder / "methods.png").stat().st_size < 100_000
    assert "## Pictures" not in page
    assert "\n\n\n" not in page
    # Of a study that is not finished.
    values["runs"] = [each for each in records if each["method"] != "forward_kl"]
    values["runs"][0] = {**records[0], "figures": {}, "diverged": True}
    (folder / LANGUAGE).write_text(json.dumps(values))
    page = make_page(folder)
    assert "| reverse_kl | **+0.250 ± 0.000** worse |" in page
    assert "less forward_kl" not in page
    assert "have no figures: `middle-small-sft-20-0.0015-seed100-tuning`." in page


def test_study_refuses_what_it_cannot_use(tmp_path, capsys):
    page = tmp_path / "nothing.md"
    assert study.main(["--only-page", f"--page={page}"]) == 2
    assert "leave --only-page out" in capsys.readouterr().err
    for name in ("language-10.json", "language-2.json"):
        (tmp_path / "nothing" / name).write_text("{}")
    first, second = result_files(tmp_path / "nothing")
    assert (first.stem, second.stem) == ("language-2", "language-10")
    assert study.main(["--only-page", f"--page={page}"]) == 2
    assert "cannot use the results" in capsys.readouterr().err
    assert study.main([f"--page={tmp_path / 'page.html'}"]) == 2
    assert study.main(["--jobs=-1"]) == 2


@pytest.mark.slow
def test_a_very_small_study_runs_to_its_page(tmp_path, monkeypatch, capsys):
    sources = tmp_path / "lib"
    sources.mkdir()
    for number in range(40):
        lines = [f"def f{i}(x):\n    return x + {i * number}\n" for i in range(20)]
        (sources / f"m{number}.py").write_text("".join(lines))
    plan = Plan(
        teachers={"middle": (Size(1, 32, 1), 3e-3)},
        students={"small": Size(1, 16, 1)},
        methods=("sft", "forward_kl"),
        everywhere=(),
        variants=(),
        budgets=(4,),
        middle_steps=4,
        learning_rates=(1e-3,),
        seeds=(0, 1),
        teacher_steps=6,
        teacher_batch=8,
        batch_size=8,
        seq_len=32,
        vocab_size=300,
        held_out_batches=2,
        prompts=2,
        timed=1,
    )
    calls = []

    def run(arguments, log, console):
        calls.append(arguments)
        # In a thread, where no signal can be handled.
        name, *rest = arguments
        return importlib.import_module(f"taid_jax.cli.{name}").main(rest)

    monkeypatch.setattr(_study, "run_logged", run)
    monkeypatch.setattr("taid_jax.study.plan.FULL", plan)
    words = [f"--output={tmp_path / 'out'}", "--jobs=1", f"--sources={sources}"]
    assert study.main(words) == 0
    capsys.readouterr()
    page = (tmp_path / "out" / "study.md").read_text()
    assert "| forward_kl | 2 |" in page
    assert f"| {EQUAL_TIME} | 2 |" in page
    folder = tmp_path / "out" / "study"
    found = json.loads((folder / LANGUAGE).read_text())
    assert len(found["runs"]) == 2 + 2 * 3
    assert not list(pathlib.Path(tmp_path / "out").rglob("checkpoints"))

    # A second time nothing is run, and the page is the same; so from its folder alone.
    made, count = page, len(calls)
    assert study.main(words) == 0
    assert study.main([f"--page={folder}.md", "--only-page"]) == 0
    assert len(calls) == count
    assert (tmp_path / "out" / "study.md").read_text() == made
    # Of other texts it is another study.
    (sources / "more.py").write_text("x = 1\n" * 200)
    assert study.main(words) == 2
    assert "a study of other texts" in capsys.readouterr().err
    assert PICTURES not in [path.name for path in folder.iterdir()]
