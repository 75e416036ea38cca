"""Runs of the trainer on texts of a model, from flags to the exported student."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("texts", ["mixed:0.5", "adaptive", "student"])
def test_train_tpu_trains_on_the_students_own_answers(
    lines_of, train_tpu, arguments, tmp_path, texts
):
    flags = [
        f"--texts={texts}",
        "--completion-tokens=6",
        "--buffer-capacity=16",
        *(["--adaptive-step=1.0"] if texts == "adaptive" else []),
        *(["--pack"] if texts == "student" else ["--no-pack"]),
        "--eval-every=2",
        "--learning-rate=1e-6",  # the held-out loss hardly moves
    ]
    assert train_tpu.main([*arguments, *flags]) == 0
    rows = lines_of(tmp_path / "run" / "metrics.jsonl")
    counts = [row["completions"] for row in rows]
    assert sum(counts) > 0
    assert rows[-1]["buffer_size"] > 0
    assert (min(counts) > 0) == (texts == "student")
    assert ("adaptive_threshold" in rows[-1]) == (texts == "adaptive")
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    trained = report["texts"]["trained_by_age"]
    assert sum(trained.values()) == sum(counts)


@pytest.mark.slow
@pytest.mark.parametrize("texts", ["student", "teacher"])
def test_train_tpu_needs_no_more_than_prompts(
    lines_of, train_tpu, load_script, arguments, tmp_path, texts, capsys
):
    """The teacher answers the held-out prompts, and so does `evaluate` ask it to."""
    path = tmp_path / "prompts.jsonl"
    asked = [f"The {animal} takes the" for animal in ("cat", "dog", "bird", "mouse")]
    asked += [f"{text} {thing} and" for text in asked for thing in ("house", "ball")]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    flags = [
        *arguments,
        f"--data={path}",
        f"--texts={texts}",
        "--objective=reverse_kl",
        "--completion-tokens=6",
        "--completion-temperature=1.0",
        "--rollout-batch=12",
        "--buffer-capacity=32",
        "--steps=6",
        "--save-every=0",
    ]
    assert train_tpu.main(flags) == 0
    assert "held-out prompts have the teacher's answers" in capsys.readouterr().out
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    assert report["held_out_tokens"] > 0
    assert report["kl_after"] < report["kl_before"]
    trained = sum(report["texts"]["trained_by_age"].values())
    assert 48 <= trained <= sum(report["texts"]["written"].values())
    assert {each["end"] for each in report["texts"]["samples"]} <= {
        "ended",
        "truncated",
    }
    for row in lines_of(run / "metrics.jsonl"):
        for name in ("student_entropy", "student_nll", "teacher_nll", "kl_reverse"):
            assert row[name] > 0
        spent = row["generate_seconds"] + row["learn_seconds"]
        assert 0 < spent <= row["step_seconds"]
    scores = tmp_path / "scores.json"
    flags = [f"--config={run / 'settings.json'}", f"--student={run / 'student'}"]
    assert load_script("evaluate").main([*flags, f"--json={scores}"]) == 0
    assert json.loads(scores.read_text())["kl_teacher"] == report["kl_after"]


@pytest.mark.slow
def test_train_tpu_on_pairs_goes_on_bit_for_bit(
    lines_of, train_tpu, load_script, arguments, questions, tmp_path
):
    """Of half of the prompts the data have the answer, of the others the teacher's."""
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    for number, record in enumerate(lines):
        if number % 2:
            record.pop("completion")
    path = tmp_path / "half.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    flags = [
        *arguments,
        f"--data={path}",
        "--method=distillm2",
        "--no-pack",
        "--completion-tokens=6",
        "--batch-size=16",
        "--rollout-batch=12",
        "--seq-len=40",
        "--buffer-capacity=32",
        "--grad-accum=2",
        "--learning-rate=0.01",
        "--save-every=2",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_tpu.main([*flags, "--steps=6", f"--output={whole}"]) == 0
    assert train_tpu.main([*flags, "--steps=6", f"--output={cut}", "--keep=9"]) == 0
    (cut / "student").rename(tmp_path / "student")
    again = [*flags, "--steps=6", f"--output={cut}", "--resume", "--resume-step=2"]
    assert train_tpu.main(again) == 0
    name = "student/model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    rows = lines_of(whole / "metrics.jsonl")
    assert [row["student_weight"] for row in rows] == pytest.approx(
        [1 + 0.5 * min(1, 2 * step / 6) for step in range(6)], rel=1e-6
    )
    for row, other in zip(rows, lines_of(cut / "metrics.jsonl"), strict=True):
        assert (row["loss"], row["completions"]) == (other["loss"], 8)
        both = row["teacher_texts_loss"] + row["student_texts_loss"]
        assert both == pytest.approx(row["loss"], rel=1e-6)
        assert row["tokens"] > row["completions"] * 2
    report = json.loads((whole / "report.json").read_text())
    assert report["kl_after"] < report["kl_before"]
    assert report["settings"]["objective"]["objective"] == "distillm2"
    scores = tmp_path / "scores.json"
    flags = [f"--config={whole / 'settings.json'}", f"--student={whole / 'student'}"]
    assert load_script("evaluate").main([*flags, f"--json={scores}"]) == 0
    assert json.loads(scores.read_text())["loss"] == report["loss_after"]


def test_train_tpu_without_answers_needs_texts_of_a_model(
    train_tpu, arguments, tmp_path, capsys
):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert train_tpu.main([*arguments, f"--data={path}"]) == 2
    assert "no example is left to train on (wrong_shape: 2)" in capsys.readouterr().err


@pytest.mark.slow
def test_train_tpu_two_processes_take_the_texts_of_one(
    lines_of, train_tpu, arguments, tmp_path
):
    flags = [
        *arguments,
        "--no-pack",
        "--texts=mixed:0.5",
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
    shared, whole = (
        lines_of(tmp_path / "shared" / "metrics.jsonl"),
        lines_of(tmp_path / "whole" / "metrics.jsonl"),
    )
    assert 0 < sum(row["completions"] > 0 for row in whole) < len(whole)
    for row, other in zip(shared, whole, strict=True):
        for key in ("completions", "buffer_size"):
            assert row[key] == other[key]
        # Float32 sums in another order.
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
