import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")

from parity.cases import recorded_cases  # noqa: E402
from parity.recordings import RecordingError, load_arrays, load_json  # noqa: E402
from parity.runs import load_run  # noqa: E402
from parity.schedule import recorded_rows  # noqa: E402


def _changed(path, target, **changes):
    """Writes a copy of an .npz with some arrays replaced, or left out where None."""
    arrays = load_arrays(path) | {k.replace("__", "/"): v for k, v in changes.items()}
    np.savez(target, **{k: v for k, v in arrays.items() if v is not None})


def test_load_arrays_names_a_missing_file(tmp_path):
    with pytest.raises(RecordingError, match=r"no such file"):
        load_arrays(tmp_path / "losses.npz")


def test_load_arrays_refuses_what_is_no_npz_and_pickles(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(RecordingError, match=r"text\.npz"):
        load_arrays(tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(RecordingError, match=r"objects\.npz"):
        load_arrays(tmp_path / "objects.npz")


def test_load_json_refuses_what_is_no_object(tmp_path):
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(RecordingError, match="JSON object"):
        load_json(tmp_path / "run.json")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RecordingError, match="not JSON"):
        load_json(tmp_path / "run.json")


def test_recorded_cases_name_every_missing_and_misshapen_array(golden, tmp_path):
    _changed(
        golden / "losses.npz",
        tmp_path / "losses.npz",
        small__teacher=None,
        small__fkl__grad=np.zeros((2, 5, 16), np.float32),
        small__mask=np.zeros((2, 4), np.int32),
    )
    with pytest.raises(RecordingError) as error:
        recorded_cases(tmp_path, ["fkl"])
    for part in ("small/teacher", "small/fkl/grad (2, 5, 16)", "small/mask (2, 4)"):
        assert part in str(error.value)
    assert "need (2, 5, 17)" in str(error.value)


def test_schedule_names_a_missing_array(golden, tmp_path):
    _changed(golden / "schedule.npz", tmp_path / "schedule.npz", default__momentum=None)
    with pytest.raises(RecordingError, match="default/momentum"):
        recorded_rows(tmp_path)


def test_load_run_names_what_is_wrong(golden, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(golden / "run_sft", folder)
    assert load_run(folder).settings.objective == "sft"
    _changed(
        golden / "run_sft" / "batches.npz",
        folder / "batches.npz",
        labels=np.zeros((60, 4, 47), np.int64),
    )
    with pytest.raises(RecordingError, match=r"labels \(60, 4, 47\), need"):
        load_run(folder)
    shutil.copyfile(golden / "run_sft" / "batches.npz", folder / "batches.npz")
    shutil.rmtree(folder / "teacher")
    with pytest.raises(RecordingError, match="teacher"):
        load_run(folder)
    (folder / "run.json").write_text('{"loss": "unheard of"}')
    with pytest.raises(RecordingError, match="unheard of"):
        load_run(folder)
