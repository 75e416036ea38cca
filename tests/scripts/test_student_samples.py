"""Runs of the trainer with student samples, from flags to the exported student."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest


def _rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["mixed", "adaptive"])
def test_train_tpu_trains_on_the_students_own_answers(
    train_tpu, arguments, tmp_path, sampler
):
    flags = [
        "--no-pack",
        f"--on-policy={sampler}",
        "--completion-tokens=6",
        "--buffer-capacity=16",
        *(["--adaptive-step=1.0"] if sampler == "adaptive" else []),
        "--eval-every=2",
        "--learning-rate=1e-6",  # the held-out loss hardly moves
    ]
    assert train_tpu.main([*arguments, *flags]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert sum(row["on_policy"] for row in rows) > 0
    assert rows[-1]["buffer_size"] > 0
    if sampler == "mixed":
        assert sum(row["on_policy"] for row in rows) < len(rows)
        assert rows[-1]["on_policy_threshold"] == 0
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


@pytest.mark.slow
def test_train_tpu_two_processes_take_the_samples_of_one(
    train_tpu, arguments, tmp_path
):
    flags = [
        *arguments,
        "--no-pack",
        "--on-policy=mixed",
        "--completion-tokens=6",
        "--buffer-capacity=16",
        "--steps=6",
        "--eval-every=0",
        "--held-out-batches=1",
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(root),
    }
    joined = [f"--coordinator=127.0.0.1:{port}", "--num-processes=2"]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                root / "scripts" / "train_tpu.py",
                *flags,
                f"--output={tmp_path / 'shared'}",
                *joined,
                f"--process-id={number}",
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for number in range(2)
    ]
    try:
        assert [process.wait(240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert train_tpu.main([*flags, f"--output={tmp_path / 'whole'}"]) == 0
    shared, whole = _rows(tmp_path / "shared"), _rows(tmp_path / "whole")
    assert 0 < sum(row["on_policy"] for row in whole) < len(whole)
    for row, other in zip(shared, whole, strict=True):
        for key in ("on_policy", "buffer_size"):
            assert row[key] == other[key]
        # Float32 sums in another order.
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
