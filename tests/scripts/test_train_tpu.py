import datetime
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).parents[2]


def _rows(folder):
    from taid_jax.train.utilisation import MEASURED

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def _weights(folder):
    return load_file(folder / "student" / "model.safetensors")


def _same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.fixture(scope="module")
def finished(train_tpu, teacher, text, tmp_path_factory):
    """The folder of a run that went to its end."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    status = train_tpu.main(
        [
            f"--teacher={teacher}",
            "--student-layers=2",
            f"--data={text}",
            f"--output={folder}",
            "--steps=12",
            "--batch-size=8",
            "--seq-len=16",
            "--eval-every=4",
            "--save-every=3",
            "--held-out-fraction=0.3",
            "--learning-rate=0.01",
        ]
    )
    assert status == 0
    return folder


def test_train_tpu_leaves_what_it_promises(finished):
    report = json.loads((finished / "report.json").read_text())
    promised = {
        "teacher_perplexity",
        "student_perplexity_before",
        "student_perplexity_after",
        "kl_before",
        "kl_after",
        "seconds",
        "settings",
        "utilisation",
    }
    assert promised <= report.keys()
    busy = report["utilisation"]
    assert busy["chips"] == 8
    # Nobody knows the peak of a CPU; operations are counted all the same.
    assert busy["mfu"] is None
    assert busy["student_flops"] > busy["teacher_flops"] / 4 > 0
    assert 0 < busy["data_seconds"] < busy["host_seconds"] < busy["step_seconds"]
    assert busy["flops_per_second_per_chip"] > 0
    assert report["kl_after"] < report["kl_before"]
    assert report["settings"]["run"]["steps"] == 12
    logged = {"step", "loss", "kl", "t", "delta_t", "learning_rate", "grad_norm"}
    rows = _rows(finished)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(logged <= row.keys() for row in rows)
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").iterdir())


def test_train_tpu_student_is_what_the_report_says(finished, text):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from taid_jax.data import held_out_batches, load_dataset

    model, info = AutoModelForCausalLM.from_pretrained(
        finished / "student", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    data = load_dataset(str(text), tokenizer, seq_len=16, held_out_fraction=0.3)
    nll = count = 0.0
    for batch in held_out_batches(data.held_out, 1, limit=64):  # 8 batches of 8
        segments = batch["segment_ids"][0]
        for segment in range(1, segments.max() + 1):
            where = segments == segment
            ids = torch.from_numpy(batch["input_ids"][:, where]).long()
            labels = torch.from_numpy(batch["labels"][:, where]).long()
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            counted = labels[0, 1:] != -100
            loss = torch.nn.functional.cross_entropy(
                logits[counted], labels[0, 1:][counted], reduction="sum"
            )
            nll, count = nll + float(loss), count + int(counted.sum())
    report = json.loads((finished / "report.json").read_text())
    assert report["held_out_tokens"] == count
    # Float32 on both sides; the bound is 0.5%.
    np.testing.assert_allclose(
        report["student_perplexity_after"], np.exp(nll / count), rtol=1e-4
    )


def test_train_tpu_output_with_something_in_it_is_left_alone(
    train_tpu, arguments, tmp_path, capsys
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    assert train_tpu.main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert os.listdir(tmp_path / "run") == ["precious.txt"]


def _expect(train_tpu, capsys, flags, *messages):
    assert train_tpu.main(flags) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    for message in messages:
        assert message in err


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--teacher=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--data=/nowhere.jsonl"], ["/nowhere.jsonl"]),
        (["--seq-len=65"], ["65", "context of 64"]),
        (["--student-layers=5"], ["4 layers", "got 5"]),
        (["--mesh=data=3"], ["data=3", "8 device"]),
        (["--mesh=model=2"], ["no axis is called 'model'"]),
        (["--batch-size=6"], ["6 sequences", "8 devices"]),
        (["--resume"], ["no checkpoints to go on from"]),
        (["--output=/proc/nothing"], ["/proc/nothing"]),
        (["--config=/nowhere.yaml"], ["cannot read the settings"]),
    ],
)
def test_train_tpu_bad_input_is_one_message(
    train_tpu, arguments, capsys, flags, messages
):
    _expect(train_tpu, capsys, arguments + flags, *messages)


@pytest.mark.parametrize(
    "flags",
    [
        ["--t-start=1.5"],
        ["--alpha=-1"],
        ["--learning-rate=0"],
        ["--steps=0"],
        ["--steps=many"],
        ["--objective=kd"],
        ["--nonsense=1"],
    ],
)
def test_train_tpu_bad_flag_is_status_2(train_tpu, arguments, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        train_tpu.main(arguments + flags)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_train_tpu_student_with_another_tokenizer_is_refused(
    train_tpu, arguments, make_model, capsys
):
    student = make_model(layers=1, vocab_size=280)
    flags = [flag for flag in arguments if not flag.startswith("--student")]
    _expect(train_tpu, capsys, [*flags, f"--student={student}"], "tokenizers")


def test_train_tpu_damaged_teacher_is_named(
    train_tpu, arguments, teacher, tmp_path, capsys
):
    copy = tmp_path / "damaged"
    shutil.copytree(teacher, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    _expect(train_tpu, capsys, [*arguments, f"--teacher={copy}"], "model.safetensors")


def test_train_tpu_bad_data_line_is_named(train_tpu, arguments, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a b c"}\n{"text": \n')
    flags = [*arguments, f"--data={path}", "--bad-records=raise"]
    _expect(train_tpu, capsys, flags, "data.jsonl", "line 2")


def test_train_tpu_resume_with_other_settings_lists_them(
    train_tpu, arguments, finished, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path / "run")
    flags = [*arguments, "--resume", "--t-start=0.2", "--seed=5"]
    _expect(train_tpu, capsys, flags, "objective.t_start", "run.seed")
    _same(_weights(tmp_path / "run"), _weights(finished))


def test_train_tpu_resumed_on_another_day_goes_on_with_the_first(
    train_tpu, arguments, tmp_path, monkeypatch, capsys
):
    """A template with a clock would give other data; what is not read is named."""
    data = tmp_path / "data"
    data.mkdir()
    turns = [("human", "The {}?"), ("gpt", "sees the {}.")]
    lines = [
        json.dumps(
            {
                "conversations": [
                    {"from": who, "value": said.format(n)} for who, said in turns
                ],
                "source": "x",
            }
        )
        for n in range(12)
    ]
    (data / "train.jsonl").write_text("\n".join(lines))
    (data / "test.jsonl").write_text("no JSON")
    template = tmp_path / "clock.jinja"
    template.write_text(
        "{{ strftime_now('%d') }}{% for m in messages %}{{ m.role[:1] + m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    flags = [*arguments, f"--data={data}", f"--chat-template={template}"]
    flags += ["--seq-len=48", "--steps=2"]

    class Day(datetime.date):
        said = "2026-01-31"

        @classmethod
        def today(cls):
            return datetime.date.fromisoformat(cls.said)

    clock = types.SimpleNamespace(date=Day)
    monkeypatch.setattr("taid_jax.settings.epochs.datetime", clock)
    assert train_tpu.main(flags) == 0
    told = capsys.readouterr().out
    assert "keys not used: source (12 records)" in told
    assert "files passed over: 1 (" in told
    assert "of the split train are read" in told
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["settings"]["data"]["template_date"] == "2026-01-31"
    assert report["data"]["unused_keys"] == {"source": 12}
    Day.said = "2026-02-01"
    assert train_tpu.main([*flags, "--resume"]) == 0
    flags.append("--template-date=2026-02-01")
    _expect(train_tpu, capsys, [*flags, "--resume"], "template_date")


def test_train_tpu_resume_with_other_data_is_refused(
    train_tpu, arguments, finished, teacher, text, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path / "run")
    (text / "999.txt").write_text("Something that was not there before, as it is new.")
    try:
        _expect(train_tpu, capsys, [*arguments, "--resume"], "data")
    finally:
        (text / "999.txt").unlink()


def test_train_tpu_config_file_and_flags_over_it(train_tpu, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\nobjective:\n  t_start: 0.2\n")
    settings = train_tpu.parse([f"--config={path}", "--steps=9"]).settings
    assert settings.run.steps == 9
    assert settings.objective.t_start == 0.2


def test_train_tpu_random_student_from_a_config(
    train_tpu, arguments, teacher, tmp_path
):
    flags = [flag for flag in arguments if not flag.startswith("--student")]
    flags += [f"--student-config={teacher / 'config.json'}", "--steps=2"]
    flags += ["--eval-every=0", "--save-every=0"]
    assert train_tpu.main(flags) == 0
    assert (tmp_path / "run" / "student" / "config.json").exists()


def _start(arguments):
    """Starts the script by itself, on one device as a user would."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [sys.executable, "scripts/train_tpu.py", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for_step(folder, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[0])


@pytest.mark.slow
def test_train_tpu_killed_and_resumed_is_the_uninterrupted_run(arguments, tmp_path):
    steps = ["--steps=40", "--save-every=5", "--eval-every=7"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = _start([*arguments, *steps, f"--output={whole}"])
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output

    flags = [*arguments, *steps, f"--output={cut}"]
    chance = random.Random(0)
    began = False
    for number, status in (
        (signal.SIGTERM, 1),
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGTERM, 1),
    ):
        process = _start(flags + (["--resume"] if began else []))
        done = len(_rows(cut)) if began else 0
        # The first save is at step 5: before it there is nothing to go on from.
        _wait_for_step(cut, max(done, 5) + chance.randint(1, 3), process)
        time.sleep(chance.random() * 0.2)
        process.send_signal(number)
        output = process.communicate(timeout=120)[0]
        if process.returncode == 0:
            break  # It was done before the signal came.
        assert process.returncode == status, output
        began = True
    process = _start([*flags, "--resume"])
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    _same(_weights(cut), _weights(whole))
    assert _rows(cut) == _rows(whole)
    for name in ("evaluations.jsonl",):
        assert (cut / name).read_text() == (whole / name).read_text()
    first, second = (
        json.loads((folder / "report.json").read_text()) for folder in (whole, cut)
    )
    assert first["kl_after"] == second["kl_after"]
