"""The study of a student's own texts, docs/examples/drift.py, made very small."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[1] / "docs" / "examples" / "drift.py"


@pytest.fixture(autouse=True)
def as_a_user_has_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def drift():
    spec = importlib.util.spec_from_file_location("drift", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_are_sums_that_stay_below_the_bound(drift):
    rows = drift.draw(np.random.default_rng(0), 100)
    first, added, sums = np.split(rows, [1, 1 + drift.STEPS], axis=1)
    want = (first + np.cumsum(added, axis=1)) % drift.MODULUS
    np.testing.assert_array_equal(sums, want)
    assert {*sums.ravel()} == {*range(drift.HIGHEST + 1)}
    assert {*added.ravel()} == {0, 1, 2, 4, 5}
    assert drift.prompt_of(np.array([2, *range(12), *sums[0]])).split() == [
        *map(str, range(12)),
        ":",
        "2",
    ]


@pytest.mark.slow
def test_study_runs_goes_on_and_refuses_another(drift, tmp_path, monkeypatch):
    words = f"--output {tmp_path / 'out'} --seeds 1 --records 200 --prompts 8"
    words += " --batch-size 8 --teacher-steps 3 --start-steps 2 --steps 2"
    words = [*words.split(), "--student", "1", "8", "1", "--teacher", "1", "8", "1"]
    words += ["--methods", "sft, data", "reverse KL, student"]
    results = drift.main(words)
    assert results == json.loads((tmp_path / "out" / "drift.json").read_text())
    methods = [run["method"] for run in results["runs"]]
    assert methods == ["start", "sft, data", "reverse KL, student"]
    start, *others = (run["figures"] for run in results["runs"])
    assert start["kl_data"] > 0
    assert len({run["kl_data"] for run in (start, *others)}) == 3
    # The teacher is no distance from itself, wherever it is.
    assert abs(results["teacher"]["kl_own"]) < 1e-6
    # What is done is not done again.
    monkeypatch.setattr(drift, "distil", None)
    assert drift.main(words)["runs"] == results["runs"]
    with pytest.raises(SystemExit, match="other settings"):
        drift.main([*words, "--rate", "1"])
