import datetime
import errno
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
from rich.console import Console

ROOT = pathlib.Path(__file__).parents[2]


def test_train_tpu_leaves_what_it_promises(rows_of, finished):
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
    logged = {
        "step",
        "loss",
        "kl_teacher",
        "t",
        "delta_t",
        "learning_rate",
        "grad_norm",
    }
    rows = rows_of(finished)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(logged <= row.keys() for row in rows)
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").iterdir())
    assert report["exported_step"] == 12


def test_train_tpu_shows_what_the_models_complete_and_where_they_differ(finished):
    shown = json.loads((finished / "shown.json").read_text())
    assert shown["outcome"] == "done"
    completions = shown["completions"]
    texts = completions["texts"]
    assert set(texts) == {"reference", "teacher", "student before", "student after"}
    assert (
        {len(each) for each in texts.values()} == {len(completions["prompts"])} == {3}
    )
    assert texts["student before"] != texts["student after"]
    assert len(shown["tokens"]) == 4
    kls = [token[1] for row in shown["tokens"] for token in row if token[1:]]
    last = json.loads((finished / "evaluations.jsonl").read_text().splitlines()[-1])
    # Of four rows, the other of all.
    assert 0.5 < np.mean(kls) / last["kl_teacher"] < 2
    page = (finished / "report.html").read_text()
    assert "the student of step 12 was exported" in page
    assert page.count('data-at="0:') > 20


def test_train_tpu_a_run_that_diverged_has_a_page_that_says_so(
    train_tpu, run, capsys, monkeypatch
):
    from taid_jax.train.loop import Loop, TrainingError

    def diverge(loop, state):
        raise TrainingError("stopped at <b>step 5</b>")

    before = json.loads((run / "shown.json").read_text())["completions"]
    monkeypatch.setattr(Loop, "run", diverge)
    assert train_tpu.main([f"--output={run}", "--resume", "--steps=15"]) == 1
    err = capsys.readouterr().err
    assert err == f"stopped at <b>step 5</b>. {run}/report.html shows how it went\n"
    page = (run / "report.html").read_text()
    assert "without an export: stopped at &lt;b&gt;step 5&lt;/b&gt;" in page
    # What the student said before the first step is known from the start of the run.
    del before["texts"]["student after"]
    assert json.loads((run / "shown.json").read_text())["completions"] == before


def test_student_rows_of_a_finished_run_agree(finished):
    """`python -m parity student`: weights, logits and perplexity by PyTorch."""
    pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")
    from parity.rows import failed
    from parity.student import student_rows

    rows = student_rows(finished)
    quantities = [row.quantity for row in rows]
    assert quantities == ["weights", "logits", "held-out perplexity"]
    assert failed(rows) == []


@pytest.mark.parity
def test_student_rows_fail_for_another_report_or_none(run):
    from parity.rows import failed
    from parity.student import RunError, student_rows

    report = json.loads((run / "report.json").read_text())
    report["student_perplexity_after"] *= 1.01
    (run / "report.json").write_text(json.dumps(report))
    found = [row.quantity for row in failed(student_rows(run))]
    assert found == ["held-out perplexity"]
    (run / "report.json").unlink()
    with pytest.raises(RunError, match="no finished run"):
        student_rows(run)


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


def test_train_tpu_damaged_teacher_is_named(
    train_tpu, arguments, teacher, tmp_path, capsys
):
    copy = tmp_path / "damaged"
    shutil.copytree(teacher, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    flags = [*arguments, f"--teacher={copy}"]
    _expect(train_tpu, capsys, flags, "model.safetensors")
    # Once it is repaired, the same words do.
    assert not (tmp_path / "run").exists()


def test_train_tpu_bad_data_line_is_named(train_tpu, arguments, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a b c"}\n{"text": \n')
    flags = [*arguments, f"--data={path}", "--bad-records=raise"]
    _expect(train_tpu, capsys, flags, "data.jsonl", "line 2")


def test_train_tpu_resume_with_other_settings_lists_them(
    same_student, train_tpu, arguments, finished, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path / "run")
    flags = [*arguments, "--resume", "--t-start=0.2", "--seed=5"]
    _expect(train_tpu, capsys, flags, "objective.t_start", "run.seed")
    same_student(tmp_path / "run", finished)


@pytest.mark.slow
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
    monkeypatch.setattr("taid_jax.train.run.datetime", clock)
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
    other = shutil.copytree(text, tmp_path / "other")
    (other / "999.txt").write_text("Something that was not there before, as it is new.")
    settings = (tmp_path / "run" / "settings.json").read_text()
    flags = [*arguments, f"--data={other}", "--resume"]
    _expect(train_tpu, capsys, flags, f"the data of {other}")
    # The next start goes on with the data of the run.
    assert (tmp_path / "run" / "settings.json").read_text() == settings


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def _flip_a_bit(run, step):
    data = run / "checkpoints" / str(step) / "state" / "ocdbt.process_0" / "d"
    path = max(data.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_train_tpu_resume_of_a_damaged_folder_needs_the_folder_only(
    rows_of,
    same_student,
    train_tpu,
    run,
    finished,
    teacher,
    text,
    tmp_path,
    monkeypatch,
    capsys,
):
    _flip_a_bit(run, 12)
    (run / "settings.json").write_text('{"run": {"seed": 1')
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:5], "}", *lines[6:]]))
    (run / "evaluations.jsonl").write_bytes(b"\xff\0")
    # Another spelling of the same files is no contradiction.
    (tmp_path / "link").symlink_to(teacher)
    monkeypatch.chdir(text.parent)
    flags = [f"--teacher={tmp_path / 'link'}", f"--data={text.name}"]
    assert train_tpu.main(["--resume", f"--output={run}", *flags]) == 0
    out, err = capsys.readouterr()
    assert "settings.json" in err
    for line in (
        "12 is damaged: state/",
        "going on from checkpoint 9",
        "metrics.jsonl is damaged: line 6",
        "evaluations.jsonl is not the checkpoint's",
    ):
        assert line in out
    same_student(run, finished)
    for name in ("evaluations.jsonl", "settings.json"):
        old, new = ((folder / name).read_text() for folder in (finished, run))
        assert name == "settings.json" or old == new
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5, 10, 11, 12]
    names = {path.name for path in (run / "set_aside").iterdir()}
    assert names == {"12", "metrics.jsonl"}
    # What was given at the start is written down again.
    assert json.loads((run / "settings.json").read_text())["run"]["steps"] == 12


def test_train_tpu_resume_on_other_devices_takes_the_usual_mesh(train_tpu, capsys):
    from taid_jax.settings import RunSettings, from_dict

    saved = from_dict({"mesh": "data=3", "resume": True})
    console = Console()
    assert train_tpu.with_mesh_for_here(saved, console).run.mesh == RunSettings().mesh
    assert "data=3 does not match the 8 device(s)" in capsys.readouterr().out
    fits = from_dict({"mesh": "data=2,fsdp=4", "resume": True})
    assert train_tpu.with_mesh_for_here(fits, console) == fits


def test_train_tpu_resume_with_another_teacher_is_refused(
    train_tpu, run, make_model, capsys
):
    other = make_model(seed=1)
    flags = ["--resume", f"--output={run}", f"--teacher={other}"]
    _flip_a_bit(run, 12)
    before = sorted((run / "checkpoints").iterdir())
    settings = (run / "settings.json").read_text()
    _expect(train_tpu, capsys, flags, "the teacher's weights differ")
    _expect(train_tpu, capsys, [*flags, "--student-layers=1"], "student_layers")
    # What was refused is not what the next start goes on with, and nothing is moved.
    assert (run / "settings.json").read_text() == settings
    assert sorted((run / "checkpoints").iterdir()) == before


@pytest.mark.slow
def test_train_tpu_run_is_ended_earlier_and_then_made_longer(
    rows_of, train_tpu, run, finished, capsys
):
    flags = ["--resume", f"--output={run}"]
    _expect(train_tpu, capsys, [*flags, "--steps=11"], "need at least 12")
    assert train_tpu.main([*flags, "--resume-step=9", "--steps=9"]) == 0
    assert rows_of(run) == rows_of(finished)[:9]
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    # That checkpoint was not evaluated before.
    assert [json.loads(line)["step"] for line in lines] == [0, 4, 8, 9]
    assert {path.name for path in (run / "set_aside").iterdir()} == {"12"}

    assert train_tpu.main([*flags, "--steps=14"]) == 0
    assert "14 steps in place of 12" in " ".join(capsys.readouterr().out.split())
    rows = rows_of(run)
    assert rows[:9] == rows_of(finished)[:9]
    assert [row["step"] for row in rows] == list(range(1, 15))
    rates = [row["learning_rate"] for row in rows]
    expected = [0.01 * (1 + np.cos(np.pi * step / 14)) / 2 for step in range(9, 14)]
    np.testing.assert_allclose(rates[9:], expected, rtol=1e-5)
    report = json.loads((run / "report.json").read_text())
    assert report["settings"]["run"]["steps"] == 14


def test_train_tpu_two_runs_in_one_folder_are_refused(train_tpu, run, capsys):
    from taid_jax.settings import from_dict
    from taid_jax.train.folder import RunFolder

    other = RunFolder(from_dict({"output": str(run), "resume": True}).run)
    other.claim()
    flags = ["--resume", f"--output={run}"]
    _expect(train_tpu, capsys, flags, f"process {os.getpid()} on")
    other.close()


def _fill_the_disk(monkeypatch, owner, name, when=lambda *arguments: True):
    real = getattr(owner, name)

    def failing(*arguments, **options):
        if when(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


def _is_one_message_and_the_way_on(captured, message, last):
    assert "Traceback" not in captured.out + captured.err
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert f"The last good checkpoint is {last} in" in captured.err
    assert "with --resume goes on" in captured.err


@pytest.mark.slow
def test_train_tpu_starts_anew_and_goes_on_after_a_full_disk(
    same_student, train_tpu, arguments, finished, tmp_path, capsys, monkeypatch
):
    """What a kill before the first save left is in the folder already."""
    from taid_jax.train import checkpoint

    run = tmp_path / "run"
    (run / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    shutil.copy(finished / "settings.json", run)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (run / name).write_text((finished / name).read_text().replace(": 0.", ": 9."))
    _expect(train_tpu, capsys, arguments, "--resume starts it anew")

    with monkeypatch.context() as patch:
        _fill_the_disk(patch, checkpoint, "write_digests", lambda at, step: step == 6)
        assert train_tpu.main([*arguments, "--resume"]) == 1
    captured = capsys.readouterr()
    assert "the run starts anew" in captured.out
    _is_one_message_and_the_way_on(captured, "checkpoint 6 cannot be written to", 4)

    assert train_tpu.main([*arguments, "--resume"]) == 0
    same_student(run, finished)
    name = "evaluations.jsonl"
    assert (run / name).read_text() == (finished / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("metrics", "metrics.jsonl cannot be written: No space left on device"),
        ("student", "student': [Errno 28] No space left on device"),
        ("curves", "curves.png cannot be written: No space left on device"),
    ],
)
def test_train_tpu_full_disk_is_one_message_and_the_way_on(
    same_student,
    train_tpu,
    arguments,
    finished,
    tmp_path,
    capsys,
    monkeypatch,
    what,
    message,
):
    from taid_jax.models.files import export
    from taid_jax.train import report

    with monkeypatch.context() as patch:
        if what == "metrics":
            at_step = lambda row: row["step"] == 5 and "loss" in row  # noqa: E731
            _fill_the_disk(patch, report, "_line", at_step)
        elif what == "student":
            _fill_the_disk(patch, export, "save_file")
        else:
            _fill_the_disk(patch, report.matplotlib.figure.Figure, "savefig")
        assert train_tpu.main(arguments) == 1
    last = 4 if what == "metrics" else 12
    _is_one_message_and_the_way_on(capsys.readouterr(), message, last)
    assert train_tpu.main([*arguments, "--resume"]) == 0
    same_student(tmp_path / "run", finished)


INTERRUPT = """
import builtins, os, runpy, signal, sys
at, sys.argv = sys.argv[1], ["scripts/train_tpu.py", *sys.argv[2:]]
real = builtins.__import__
def find(name, *args, **options):
    if name == at:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *args, **options)
def called(frame, event, argument):
    if event == "call" and frame.f_code.co_name == at:
        os.kill(os.getpid(), signal.SIGINT)
builtins.__import__ = find
sys.setprofile(called)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "at",
    [
        "jax",
        pytest.param("tyro", marks=pytest.mark.slow),
        pytest.param("load_pair", marks=pytest.mark.slow),
        pytest.param("export_model", marks=pytest.mark.slow),
    ],
)
def test_train_tpu_ctrl_c_is_one_line_at_any_moment(arguments, at):
    found = subprocess.run(
        [sys.executable, "-c", INTERRUPT, at, *arguments],
        cwd=ROOT,
        env=dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 1
    (line,) = found.stderr.split("\n", 1)[1].splitlines()
    assert line.startswith("stopped by Ctrl-C. ")
    assert "with --resume" in line
    assert ("checkpoint is 12" in line) == (at == "export_model")


def test_train_tpu_config_file_and_flags_over_it(train_tpu, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\nobjective:\n  t_start: 0.2\n")
    settings = train_tpu.parse([f"--config={path}", "--steps=9"]).settings
    assert settings.run.steps == 9
    assert settings.objective.t_start == 0.2


@pytest.mark.slow
def test_train_tpu_random_student_from_a_config(
    train_tpu, arguments, teacher, tmp_path, capsys
):
    torch = pytest.importorskip("torch", reason="transformers computes with PyTorch")
    transformers = pytest.importorskip("transformers")
    config = json.loads((teacher / "config.json").read_text())
    count = config["vocab_size"]
    # Padding that nobody trains, and a setting that nobody knows.
    config |= {"vocab_size": count + 52, "strange": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = [flag for flag in arguments if not flag.startswith("--student")]
    flags += [f"--student-config={tmp_path / 'config.json'}", "--steps=2"]
    flags += ["--eval-every=0", "--save-every=0", "--export-dtype=bfloat16"]
    assert train_tpu.main(flags) == 2
    assert "--allow-unknown-keys" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert train_tpu.main([*flags, "--allow-unknown-keys"]) == 0
    note = "student: 1 unknown settings or tensors left out: strange"
    assert note in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "report.json").read_text())["notes"] == [note]
    folder = tmp_path / "run" / "student"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(torch.arange(9)[None]).logits.float()
    assert logits.softmax(-1)[..., count:].sum(-1).max() < 1e-6
    assert logits.shape[-1] == count


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
def test_train_tpu_killed_and_resumed_is_the_uninterrupted_run(
    rows_of, same_student, arguments, tmp_path
):
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
        done = len(rows_of(cut)) if began else 0
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
    same_student(cut, whole)
    assert rows_of(cut) == rows_of(whole)
    for name in ("evaluations.jsonl",):
        assert (cut / name).read_text() == (whole / name).read_text()
    first, second = (
        json.loads((folder / "report.json").read_text()) for folder in (whole, cut)
    )
    assert first["kl_after"] == second["kl_after"]
    process = _start([*flags, "--resume"])
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "all 40 steps are done" in output
    same_student(cut, whole)
