"""Bad command lines: one message, exit status 2, and nothing on the disk."""

import json
import os
import re

import pytest

TRAIN = [
    "--teacher={teacher}",
    "--student-layers=2",
    "--data={text}",
    "--output=run",
    "--batch-size=8",
    "--seq-len=16",
    "--held-out-fraction=0.3",
]
FIRST = {
    "train_tpu": TRAIN,
    "evaluate": [*TRAIN[:1], "--student={teacher}", *TRAIN[2:]],
    "generate": [
        "--prompts=prompts.jsonl",
        "--output=answers.jsonl",
        "--model={teacher}",
        "--max-new-tokens=4",
    ],
    "compare": ["--config=good.yaml", "--output=cells", "--methods", "taid"],
    "plan": [],
    "prepare_data": ["--data={text}", "--tokenizer={teacher}", "--output=shards"],
}
LINES = [
    ("train_tpu", ["--b2=0.99999999"], "0 <= b2 < 1 in float32"),
    ("train_tpu", ["--batch-size=100000000"], "batch_size: so many sequences"),
    ("train_tpu", ["--seq-len=200000000"], "seq_len"),
    ("train_tpu", ["--seq-len=100000000"], "seq_len"),
    (
        "train_tpu",
        [
            "--texts=mixed:0.5",
            "--completion-tokens=8",
            "--buffer-capacity=2000000000",
        ],
        "buffer_capacity: so many sequences",
    ),
    ("train_tpu", ["--steps=" + "9" * 5000], "--steps"),
    ("train_tpu", ["--steps"], "--steps"),
    ("train_tpu", ["--nonsense=1"], "--nonsense"),
    ("train_tpu", ["more"], "more"),
    ("train_tpu", ["--mesh=data=1,data=1"], "data is given twice"),
    ("train_tpu", ["--mesh="], "mesh"),
    ("train_tpu", ["--mesh=data=1000"], "8 device"),
    ("train_tpu", ["--mesh=model=2"], "no axis is called 'model'"),
    ("train_tpu", ["--seq-len=65"], "context of 64"),
    ("train_tpu", ["--student-layers=5"], "got 5"),
    ("train_tpu", ["--batch-size=6"], "8 devices"),
    ("train_tpu", ["--resume", "--resume-step=3"], "no checkpoint 3; there are none"),
    ("train_tpu", ["--output=/proc/nothing"], "/proc/nothing"),
    ("train_tpu", ["--output=runs/\udcff"], "half surrogates"),
    ("train_tpu", ["--output=~/run"], "written out in place of ~"),
    ("train_tpu", ["--output=good.yaml"], "good.yaml"),
    ("train_tpu", ["--output=good.yaml/run"], "good.yaml"),
    ("train_tpu", ["--output=pipe"], "pipe"),
    ("train_tpu", ["--data=missing"], "missing"),
    ("train_tpu", ["--teacher=missing/at/all"], "missing"),
    ("train_tpu", ["--config"], "--config"),
    ("train_tpu", ["--config="], "cannot read the settings"),
    ("train_tpu", ["--config=pipe"], "it is no file"),
    ("train_tpu", ["--config=/dev/zero"], "it is no file"),
    ("train_tpu", ["--config=bad.yaml"], "cannot read the settings in bad.yaml"),
    ("train_tpu", ["--plan=v9:1x1"], "no machine is called 'v9:1x1'"),
    ("train_tpu", ["--plan=" + "9" * 5000], "no machine is called"),
    ("train_tpu", ["--plan=local:1", "--teacher=missing"], "missing"),
    ("train_tpu", ["--plan=local:8", "--mesh=data=3"], "8 device"),
    ("evaluate", ["--json=missing/x.json"], "a folder that is there"),
    ("evaluate", ["--json=."], "not a folder"),
    ("evaluate", ["--json=pipe"], "not a folder or a device"),
    ("evaluate", ["--json=" + "x" * 300], "at most 255 bytes"),
    ("evaluate", ["--batch-size=100000000"], "batch_size: so many sequences"),
    ("evaluate", ["--batch-size=6"], "8 devices"),
    ("evaluate", ["--student=/nowhere"], "/nowhere"),
    ("evaluate", ["--data=/nowhere.jsonl"], "/nowhere.jsonl"),
    ("evaluate", ["--eval-prompts=4", "--eval-tokens=64"], "context of 64"),
    ("evaluate", ["--config=bad.json"], "cannot read the settings in bad.json"),
    ("generate", ["--batch-size=0"], "batch_size: need >= 1, got 0"),
    ("generate", ["--temperature=1e-40"], "temperature 0 or >= 1e-06, got 1e-40"),
    ("generate", ["--temperature=nan"], "temperature: need >= 0"),
    ("generate", ["--max-new-tokens=2000000000"], "no prompt leaves room"),
    ("generate", ["--output=missing/x.jsonl"], "a folder that is there"),
    ("generate", ["--output=."], "not a folder"),
    ("generate", ["--prompts=missing.jsonl"], "missing.jsonl"),
    ("generate", ["--mesh=data=1,data=1"], "data is given twice"),
    ("compare", ["--set", "steps=[1"], "set: cannot read 'steps=[1'"),
    ("compare", ["--set", "steps=!!int x"], "set: cannot read"),
    ("compare", ["--set", "steps=1", "steps=2"], "steps is given twice"),
    ("compare", ["--set", "seed=3"], "set: seed has a flag of its own"),
    ("compare", ["--methods", "x" * 300], "methods"),
    ("compare", ["--seeds", "-1"], "seed"),
    ("compare", ["--config=pipe"], "it is no file"),
    ("compare", ["--output=good.yaml"], "good.yaml"),
    ("compare", ["--output=" + "x" * 300], "255 bytes"),
    ("compare", ["--output=broken"], "no report of a run"),
    ("prepare_data", ["--max-tokens=1"], "max_tokens"),
    ("prepare_data", ["--data=missing.jsonl"], "missing.jsonl"),
    ("prepare_data", ["--output=" + "x" * 300], "names of at most 255 bytes"),
    ("prepare_data", ["--output=a\0b"], "control characters"),
    ("prepare_data", ["--output=\udcff"], "half surrogates"),
    ("prepare_data", ["--output=good.yaml"], "good.yaml"),
    ("prepare_data", ["--max-record-bytes=" + "9" * 30], "max_record_bytes: need <="),
    ("prepare_data", ["--data=~/x"], "written out in place of ~"),
    ("prepare_data", ["--preset=other"], "other"),
    ("plan", ["v9:1x1"], "no machine is called 'v9:1x1'"),
    ("plan", ["local:1", "--mesh=data=1,data=1"], "data is given twice"),
]


# What is missing is found after the output folder is made.
MAKE_A_FOLDER = ("--data=missing", "--data=missing.jsonl", "--teacher=missing/at/all")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands run, with files good and bad."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text("steps: 3\n")
    (tmp_path / "bad.yaml").write_text("steps: " + "[" * 5000)
    (tmp_path / "bad.json").write_text('{"steps": 1,}')
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "The cat"}) + "\n")
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "taid.yaml").write_text("objective: taid\n")
    report = tmp_path / "broken" / "taid-seed0" / "run" / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text("{")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    LINES,
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_command_line_is_one_message_and_nothing_on_the_disk(
    load_script, teacher, text, folder, capsys, script, flags, message
):
    before = sorted(folder.rglob("*"))
    first = [flag.format(teacher=teacher, text=text) for flag in FIRST[script]]
    if script == "compare" and "--methods" in flags:
        first = first[:2]
    try:
        status = load_script(script).main([*first, *flags])
    except SystemExit as end:  # of tyro and argparse
        status = end.code
    captured = capsys.readouterr()
    assert status == 2, captured.err
    # Without the frames of tyro's messages and the folders of this test.
    shown = captured.err.replace(str(folder), "").replace(str(teacher), "")
    shown = " ".join(re.sub("[─│╭╮╰╯]", " ", shown).split())
    assert "Traceback" not in shown
    assert message in shown
    assert len(shown) < 700, shown
    assert not captured.out.strip()
    if flags[0] not in MAKE_A_FOLDER:
        assert sorted(folder.rglob("*")) == before
