"""The script: from raw conversations to a trained student; bad input by name."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "prepare_data.py"

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def prepare_data(load_script):
    return load_script("prepare")


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "template.jinja"
    path.write_text(TEMPLATE)
    return path


def write_chats(path, count, first=0):
    lines = [
        json.dumps(
            {
                "prompt": f"The cat {n}?",
                "prompt_id": str(n),
                "messages": [
                    {"role": "user", "content": f"The cat {n}?"},
                    {"role": "assistant", "content": "runs " * (1 + n % 5)},
                ],
            }
        )
        for n in range(first, first + count)
    ]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A folder as UltraChat's, of very short conversations."""
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "train_sft.jsonl", 40)
    write_chats(folder / "test_sft.jsonl", 8, first=100)
    return folder


@pytest.fixture(scope="session")
def prepared(prepare_data, teacher, chats, template, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "out"
    flags = [
        "--preset=ultrachat",
        f"--data={chats}",
        f"--tokenizer={teacher}",
        f"--chat-template={template}",
        f"--output={output}",
        "--jobs=1",
    ]
    assert prepare_data.main(flags) == 0
    return output


def test_prepare_data_tells_what_became_of_the_records(
    prepare_data, teacher, chats, template, tmp_path, capsys
):
    source = tmp_path / "a.jsonl"
    lines = (chats / "train_sft.jsonl").read_text()
    source.write_text(lines + '{"messages": []}\nplain words\n')
    flags = [
        f"--data={source}",
        f"--tokenizer={teacher}",
        f"--chat-template={template}",
        f"--output={tmp_path / 'out'}",
        "--held-out-fraction=0.2",
        "--max-answer=4",
        "--jobs=1",
    ]
    assert prepare_data.main(flags) == 0
    shown = capsys.readouterr().out
    assert "of 42" in shown
    for reason in ("no_answer", "not_json", "answer_too_long"):
        assert reason in shown
    problems = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in problems]
    assert reasons.count("no_answer") == reasons.count("not_json") == 1
    assert json.loads(problems[-1])["origin"].endswith("a.jsonl, line 42")


def test_parse_lays_flags_over_the_preset(prepare_data):
    flags = ["--preset=ultrachat", "--output=o"]
    options = prepare_data.parse(flags).options
    assert options.data == "HuggingFaceH4/ultrachat_200k"
    assert (options.max_tokens, options.train_on_prompts) == (2048, True)
    flags += ["--data=d", "--max-tokens=9", "--no-train-on-prompts"]
    options = prepare_data.parse(flags).options
    assert (options.data, options.split) == ("d", "train_sft")
    assert (options.max_tokens, options.train_on_prompts) == (9, False)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ("--tokenizer=/nowhere", ["/nowhere"]),
        ("--chat-template=/nowhere.jinja", ["/nowhere.jinja cannot be read"]),
        ("--max-tokens=3", ["no example is left", "too_long: 40"]),
        ("--split=train_rl", ["beginning with 'train_rl'"]),
        ("--held-out-fraction=1", ["0 <= held_out_fraction < 1, got 1.0"]),
    ],
)
def test_prepare_data_refuses_bad_input(
    prepare_data, teacher, chats, template, tmp_path, capsys, change, messages
):
    flags = [
        f"--data={chats}",
        "--split=train_sft",
        f"--tokenizer={teacher}",
        f"--chat-template={template}",
        f"--output={tmp_path / 'out'}",
        "--jobs=1",
    ]
    name = change.partition("=")[0] + "="
    flags = [change if flag.startswith(name) else flag for flag in flags]
    flags += [] if change in flags else [change]
    assert prepare_data.main(flags) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert all(message in shown.replace("\n", " ") for message in messages)


@pytest.fixture
def training(teacher, prepared, template, tmp_path):
    """`training(name, ...)`: flags of a run of a few seconds on the shards."""

    def flags(name, *more, data=prepared):
        return [
            f"--teacher={teacher}",
            "--student-layers=2",
            f"--data={data}",
            f"--chat-template={template}",
            f"--output={tmp_path / name}",
            "--train-on-prompts",
            "--steps=8",
            "--batch-size=8",
            "--seq-len=64",
            "--eval-every=4",
            "--save-every=3",
            "--learning-rate=0.01",
            *more,
        ]

    return flags


@pytest.mark.slow
def test_train_tpu_trains_on_shards_in_buckets_and_resumes_mid_epoch(
    train_tpu, training, tmp_path
):
    """From step 6, in the second epoch of five batches: the same student."""
    flags = ("--no-pack", "--buckets=32,40")
    assert train_tpu.main(training("whole", *flags)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in (tmp_path / "cut" / "checkpoints").iterdir():
        if path.name not in ("3", "6"):
            shutil.rmtree(path)
    assert train_tpu.main(training("cut", *flags, "--resume")) == 0
    first, second = (
        load_file(tmp_path / name / "student" / "model.safetensors")
        for name in ("whole", "cut")
    )
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)


@pytest.mark.slow
def test_train_tpu_counts_bad_lines_and_goes_on(train_tpu, training, tmp_path, capsys):
    source = tmp_path / "chats.jsonl"
    write_chats(source, 20)
    source.write_text(source.read_text() + "plain words\n")
    assert train_tpu.main(training("run", "--steps=2", data=source)) == 0
    shown = capsys.readouterr().out
    assert "left out: 1 not_json" in shown
    assert "chats.jsonl, line 21: not JSON" in shown


@pytest.mark.slow
def test_prepare_data_goes_on_after_kill_9(teacher, template, tmp_path):
    """A real process, killed in the middle of encoding; the same bytes in the end."""
    source = tmp_path / "a.jsonl"
    write_chats(source, 20_000)
    flags = [
        f"--data={source}",
        f"--tokenizer={teacher}",
        f"--chat-template={template}",
        "--shard-tokens=100000",
    ]

    def start(name, jobs):
        command = [sys.executable, str(SCRIPT), *flags, f"--jobs={jobs}"]
        return subprocess.Popen(
            [*command, f"--output={tmp_path / name}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    process = start("killed", 2)
    until = time.monotonic() + 200
    while time.monotonic() < until and process.poll() is None:
        if list((tmp_path / "killed" / ".unfinished").glob("tmp*")):  # encoding
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    # To its end: as long as a worker lives, it has this pipe open.
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "manifest.json").exists()
    for name, jobs in (("killed", 1), ("whole", 2)):
        process = start(name, jobs)
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    killed, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("killed", "whole")
    )
    assert killed == whole
