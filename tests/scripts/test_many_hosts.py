"""Several real processes on this machine, joined by Gloo."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
DATA = ("--data", "--batch-size", "--seq-len", "--held-out-fraction")
SCRIPT = ROOT / "scripts" / "train_tpu.py"


@pytest.fixture(scope="module")
def wide_teacher(make_model):
    """A teacher whose heads four devices can share."""
    return make_model(num_heads=4, num_kv_heads=4)


@pytest.fixture
def flags(arguments, wide_teacher):
    """Flags of a run of a few seconds, on meshes of one to eight devices."""
    return [*arguments, f"--teacher={wide_teacher}", "--keep=4"]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Company:
    """The processes of a run; together they have eight devices, if not told."""

    def __init__(
        self,
        count,
        flags,
        folder,
        *,
        devices=None,
        each=None,
        cwds=None,
        absent=(),
        wait=60,
        slurm=False,
        script=SCRIPT,
    ):
        port = _free_port()
        self.processes = {}
        self.logs = [folder / f"log.{number}" for number in range(count)]
        environment = dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            JAX_NUM_CPU_DEVICES=str(devices or 8 // count),
            PYTHONPATH=str(ROOT),
        )
        for number in set(range(count)) - set(absent):
            own = [] if each is None else each[number]
            hosts = [f"--join-timeout={wait}", "--heartbeat-timeout=10"]
            if slurm:
                environment |= {
                    "SLURM_JOB_ID": str(port),  # JAX makes a port of it.
                    "SLURM_STEP_NODELIST": "localhost",
                    "SLURM_NTASKS": str(count),
                    "SLURM_PROCID": str(number),
                    "SLURM_LOCALID": "0",
                }
            else:
                hosts += [
                    f"--coordinator=127.0.0.1:{port}",
                    f"--num-processes={count}",
                    f"--process-id={number}",
                ]
            with self.logs[number].open("wb") as log:
                self.processes[number] = subprocess.Popen(
                    [sys.executable, script, *flags, *own, *hosts],
                    cwd=ROOT if cwds is None else cwds[number],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )

    def wait(self, seconds=240):
        """Returns the exit statuses; none is left behind."""
        deadline = time.monotonic() + seconds
        try:
            return [
                process.wait(max(0.1, deadline - time.monotonic()))
                for process in self.processes.values()
            ]
        finally:
            for process in self.processes.values():
                process.kill()

    def said(self, number):
        return self.logs[number].read_text(errors="replace")

    def wait_for_step(self, folder, step, seconds=240):
        deadline = time.monotonic() + seconds
        path = folder / "metrics.jsonl"
        while time.monotonic() < deadline:
            assert all(p.poll() is None for p in self.processes.values()), self.said(0)
            if path.exists() and len(path.read_text().splitlines()) >= step:
                return
            time.sleep(0.05)
        raise AssertionError(self.said(0))


def _rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _expect_same(found, wanted, keys=("loss", "kl_teacher", "t", "grad_norm")):
    found, wanted = _rows(found), _rows(wanted)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        for key in keys:
            # Float32 sums in another order: the bound that is promised.
            np.testing.assert_allclose(
                row[key], other[key], rtol=1e-5, err_msg=f"{key}, step {row['step']}"
            )


def _forget_after(folder, step):
    """Leaves a run as if it had been cut off just behind a checkpoint."""
    for path in (folder / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)
    (folder / "report.json").unlink()


@pytest.mark.slow
def test_two_processes_store_a_teacher_and_train_from_it(
    train_tpu, wide_teacher, flags, tmp_path
):
    """Each writes the records of its own rows, and reads those that its rows need."""
    live, store, run = tmp_path / "live", tmp_path / "store", tmp_path / "run"
    data = [flag for flag in flags if flag.split("=")[0] in DATA]
    job = [f"--teacher={wide_teacher}", *data, f"--output={store}"]
    company = Company(
        2, job, tmp_path, script=ROOT / "scripts" / "store_teacher.py", devices=4
    )
    assert company.wait() == [0, 0], company.said(0)
    names = sorted(path.name for path in store.glob("outputs-*"))
    assert names == ["outputs-00000-000.arrayrecord", "outputs-00000-001.arrayrecord"]
    student = [f"--teacher-store={store}", f"--student={wide_teacher}"]
    rest = [flag for flag in flags if not flag.startswith("--teacher=")]
    company = Company(2, [*rest, *student, f"--output={run}"], tmp_path)
    assert company.wait() == [0, 0], company.said(0)
    assert train_tpu.main([*flags, f"--output={live}"]) == 0
    _expect_same(run, live)


@pytest.mark.slow
def test_two_processes_train_and_one_goes_on_with_the_same_numbers(
    train_tpu, flags, tmp_path
):
    flags = [*flags, "--steps=6", "--eval-every=0", "--held-out-batches=1"]
    folder, copy = tmp_path / "run", tmp_path / "copy"
    company = Company(2, flags, tmp_path, devices=1)
    assert company.wait() == [0, 0], company.said(0) + company.said(1)
    assert (folder / "student" / "model.safetensors").is_file()
    assert "step 6/6" in company.said(0)
    assert "step" not in company.said(1)

    shutil.copytree(folder, copy)
    _forget_after(folder, 3)
    assert train_tpu.main([*flags, "--resume"]) == 0
    _expect_same(folder, copy)


@pytest.mark.slow
def test_process_that_waits_in_vain_ends_and_makes_nothing(flags, tmp_path):
    company = Company(2, flags, tmp_path, absent=[1], wait=3, devices=1)
    (status,) = company.wait()
    assert status != 0
    assert "joining the other processes" in company.said(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_disagree_in_settings_are_told(flags, tmp_path):
    each = [["--seed=3"], ["--seed=5", "--learning-rate=0.1"]]
    company = Company(2, flags, tmp_path, each=each, devices=1)
    assert company.wait() == [2, 2]
    for number in (0, 1):
        said = company.said(number)
        assert "run.seed: 3 and 5" in said
        assert "optimizer.learning_rate: 0.01 and 0.1" in said
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_of_slurm_that_read_other_data_are_told(flags, text, tmp_path):
    # The same path on every host, but not the same files behind it.
    cwds = [tmp_path / "first", tmp_path / "second"]
    for cwd in cwds:
        shutil.copytree(text, cwd / "text")
    path = next((cwds[1] / "text").iterdir())
    path.write_text(path.read_text() + " One more sentence.")
    company = Company(2, [*flags, "--data=text"], tmp_path, cwds=cwds, slurm=True)
    assert company.wait() == [2, 2]
    for number in (0, 1):
        said = company.said(number)
        assert "disagree in their data" in said
        assert "fingerprint" in said


@pytest.mark.slow
def test_runs_move_between_process_counts(train_tpu, flags, tmp_path):
    flags = [*flags, "--steps=60", "--save-every=15", "--eval-every=0"]
    flags += ["--learning-rate=0.001", "--held-out-batches=1"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    first = Company(2, [*flags, f"--output={moved}"], tmp_path, devices=1)
    assert train_tpu.main([*flags, f"--output={whole}"]) == 0
    assert first.wait() == [0, 0], first.said(0)
    _expect_same(moved, whole)
    _forget_after(moved, 15)
    # Tensor parallelism across processes: two of them share the rows of a batch.
    wide = ["--mesh=data=2,tensor=2", "--resume", f"--output={moved}"]
    second = Company(4, [*flags, *wide], tmp_path, devices=1)
    assert second.wait() == [0] * 4, second.said(0)
    _expect_same(moved, whole)
    _forget_after(moved, 45)
    assert train_tpu.main([*flags, "--resume", f"--output={moved}"]) == 0
    _expect_same(moved, whole)


@pytest.mark.slow
@pytest.mark.multidevice
def test_heads_that_no_mesh_divides_stay_whole_and_are_named(
    train_tpu, arguments, tmp_path
):
    flags = [*arguments, "--mesh=data=2,tensor=4", "--steps=2", "--eval-every=0"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert train_tpu.main(flags) == 0
    said = "\n".join(str(warning.message) for warning in told)
    assert "axis heads of size 2 is not cut over ('tensor',)" in said
    assert "it stays whole on each device" in said
    assert (tmp_path / "run" / "report.json").is_file()


LONG = ["--steps=2000", "--save-every=20", "--eval-every=0"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_process_that_is_killed_ends_the_others(flags, tmp_path, victim):
    folder = tmp_path / "run"
    company = Company(2, [*flags, *LONG], tmp_path, devices=1)
    company.wait_for_step(folder, 25)
    company.processes[victim].kill()
    killed, survivor = time.monotonic(), 1 - victim
    statuses = company.wait(60)
    assert time.monotonic() - killed < 60
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[survivor] not in (0, 2)
    if victim == 0:
        return

    # All go on from the checkpoint, and a signal to one saves all at the same step.
    done = len(_rows(folder))
    again = Company(2, [*flags, *LONG, "--save-every=0", "--resume"], tmp_path)
    again.wait_for_step(folder, done + 5)
    before = {path.name for path in (folder / "checkpoints").glob("[0-9]*")}
    again.processes[1].send_signal(signal.SIGTERM)
    assert again.wait() == [1, 1]
    said = [again.said(number) for number in (0, 1)]
    line = next(line for line in said[0].splitlines() if "stopped by" in line)
    assert line in said[1]
    assert "--resume" in line
    (saved,) = set(os.listdir(folder / "checkpoints")) - before
    assert f"after step {saved} of 2000" in line
    assert _rows(folder)[-1]["step"] == int(saved)
