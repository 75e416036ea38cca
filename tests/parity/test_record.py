import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")
# Of parity itself: `python -m parity` shows the rows, and CI runs both.
pytestmark = pytest.mark.parity

from parity import record, recorded, schedule  # noqa: E402
from parity.cases import recorded_cases  # noqa: E402
from parity.rows import failed  # noqa: E402
from parity.runs import RunSettings, load_run  # noqa: E402
from parity.torch_run import record_run, train  # noqa: E402


def test_record_losses_makes_a_folder_that_the_rows_accept(tmp_path):
    record.record_losses(tmp_path, seed=5)
    rows = recorded.reference_rows(tmp_path)
    assert failed(rows) == []
    names = {case.case.name for case in recorded_cases(tmp_path, ["fkl"])}
    assert len(names) > 5


def test_record_schedule_makes_a_folder_that_the_rows_accept(tmp_path):
    record.record_schedule(tmp_path, seed=5, steps=50)
    assert failed(schedule.recorded_rows(tmp_path)) == []


def test_record_run_makes_a_run_of_that_format(tmp_path):
    settings = RunSettings(steps=3, batch=2, length=16)
    record_run(tmp_path, settings, seed=5)
    run = load_run(tmp_path)
    assert run.settings == settings
    assert np.isfinite(run.steps["loss"]).all()
    assert run.steps["t_used"][0] == np.float32(settings.t_start)
    assert (np.diff(run.steps["t_after"]) > 0).all()
    # Prompts and padding are not counted, and some of both are there.
    labels, real = run.batches["labels"], run.batches["attention_mask"]
    assert (labels[real == 0] == -100).all()
    assert (labels[real == 1] == -100).any()


def test_train_reproduces_the_recorded_run(golden):
    """The training loop is the recorded one: a few steps of each run agree."""
    for name in ("run_taid", "run_sft"):
        run = load_run(golden / name)
        steps, _ = train(run.folder, run.settings, run.batches, last=4)
        for key, expected in run.steps.items():
            # Two builds of PyTorch: sums in another order, float32.
            np.testing.assert_allclose(steps[key], expected[:4], rtol=2e-5, err_msg=key)


def test_record_command_line_writes_everything(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(record, "record_losses", lambda folder, seed: made.append(seed))
    monkeypatch.setattr(
        record, "record_run", lambda folder, settings, seed: made.append(folder.name)
    )
    record.main([str(tmp_path / "new"), "--seed", "7", "--steps", "2"])
    assert made == [7, "run_taid", "run_sft"]
    assert (tmp_path / "new" / "schedule.npz").is_file()
