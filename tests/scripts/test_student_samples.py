"""Runs of the trainer with student samples, from flags to the exported student."""

import json

import pytest


@pytest.mark.parametrize(
    "sampler", [pytest.param("mixed", marks=pytest.mark.slow), "adaptive"]
)
def test_train_tpu_trains_on_the_students_own_answers(
    train_tpu, arguments, tmp_path, sampler
):
    flags = [
        "--no-pack",
        f"--sampler={sampler}",
        "--sample-tokens=6",
        "--buffer-capacity=16",
        "--adaptive-step=1.0",
        "--eval-every=2",
        "--learning-rate=1e-6",  # the held-out loss hardly moves
    ]
    assert train_tpu.main([*arguments, *flags]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert sum(row["student_samples"] for row in rows) > 0
    assert rows[-1]["replay_buffer"] > 0
    if sampler == "mixed":
        assert sum(row["student_samples"] for row in rows) < len(rows)
        assert rows[-1]["sample_threshold"] == 0
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler=mixed"], "--no-pack"),
        (["--sampler=mixed", "--no-pack"], "sample_tokens: need fewer than seq_len"),
    ],
)
def test_train_tpu_refuses_samples_that_cannot_be(
    train_tpu, arguments, capsys, flags, message
):
    assert train_tpu.main([*arguments, *flags]) == 2
    assert message in capsys.readouterr().err
