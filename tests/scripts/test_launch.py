"""The files under scripts/launch: syntax, flags, and the one that can run here."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "scripts" / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def test_launch_files_are_all_looked_at():
    scripts = {"two_processes.sh", "tpu_vm.sh", "slurm_gpu.sbatch"}
    known = {*scripts, "slurm_store.sbatch", "gke_tpu.yaml"}
    assert {path.name for path in LAUNCH.iterdir()} == known


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launch_file_says_what_was_run(path):
    top = path.read_text()[:900]
    assert re.search(r"^# Run[:,] ", top, re.MULTILINE)
    assert re.search(r"^# Not run: ", top, re.MULTILINE)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_launch_script_is_bash(path):
    checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_launch_flags_are_those_of_the_script(train_tpu):
    for path in SHELL:
        if path.name == "slurm_store.sbatch":
            continue  # Its command is parsed below.
        # From the script's name to the end of its command.
        calls = re.findall(r"train_tpu\.py((?:[^\n]*\\\n)*[^\n]*)", path.read_text())
        assert calls, path
        for call in calls:
            for flag in re.findall(r"(--[a-z-]+)", call.split("||")[0]):
                field = flag.removeprefix("--").replace("-", "_")
                assert field == "plan" or _is_setting(field), f"{path.name}: {flag}"
    for cluster in ("slurm", "gcetpu", "gketpu"):
        settings = train_tpu.parse([f"--cluster={cluster}"]).settings
        assert settings.distributed.cluster == cluster


def _is_setting(name):
    from taid_jax.settings import Settings, flatten

    return any(key.endswith(f".{name}") for key in flatten(Settings()))


def test_launch_gke_is_one_pod_per_host_with_flags_that_parse(train_tpu):
    from taid_jax.chips import CHIPS

    service, job = yaml.safe_load_all((LAUNCH / "gke_tpu.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert shape in CHIPS["v5e"].topologies
    rows, columns = map(int, shape.split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["completions"] == spec["parallelism"] == rows * columns // chips
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    settings = train_tpu.parse(container["args"]).settings
    assert settings.distributed.cluster == "gketpu"
    assert settings.data.batch_size % (rows * columns) == 0
    claims = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claims


def test_launch_tpu_vm_quotes_the_flags_for_the_other_side(tmp_path):
    # A gcloud that only writes down what it was called with.
    tool = tmp_path / "gcloud"
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path / "called"}\n')
    tool.chmod(0o755)
    environment = {"NAME": "n", "ZONE": "z", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(
        [LAUNCH / "tpu_vm.sh", "train", "--output", "/mnt/a run", "--mesh=fsdp=-1"],
        env=environment,
        check=True,
    )
    called = (tmp_path / "called").read_text().splitlines()
    assert "--worker=all" in called
    words = shlex.split(called[-1])
    assert words[words.index("--output") + 1] == "/mnt/a run"
    assert words[-1] == "--mesh=fsdp=-1"


def test_launch_slurm_store_is_jobs_and_their_merge(tmp_path, load_script):
    # A Python that only writes down what it was called with.
    tool = tmp_path / ".venv" / "bin" / "python"
    tool.parent.mkdir(parents=True)
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path / "called"}\n')
    tool.chmod(0o755)
    store = f"{tmp_path}/a store"

    def run(*words, **variables):
        (tmp_path / "called").write_text("")
        done = subprocess.run(
            ["bash", LAUNCH / "slurm_store.sbatch", store, *words],
            env={"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)}
            | {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()},
            capture_output=True,
            text=True,
        )
        return done, (tmp_path / "called").read_text().splitlines()

    flags = ["--teacher=t", "--data=d", "--kind=topk", "--dtype=bfloat16"]
    for number in ("2", "10"):
        done, called = run(*flags, ID=number, MIN="1", MAX="16")
        assert done.returncode == 0, done.stderr
        script, *words = called
        assert script == "scripts/store_teacher.py"
        command = load_script("store").parse(words)
        assert command.options.place == (int(number), 16)
        assert command.settings.run.output == f"{store}.parts/{number}"
        pathlib.Path(command.settings.run.output).mkdir(parents=True)
    done, called = run()
    assert done.returncode == 0, done.stderr
    parts = [f"{store}.parts/10", f"{store}.parts/2"]
    assert called == ["scripts/store_teacher.py", "merge", store, *parts]
    done, _ = run(*flags, ID="3", MIN="3", MAX="7")
    assert done.returncode == 2
    assert "PARTS" in done.stderr


def _two_processes(arguments, tmp_path, *flags):
    environment = dict(
        os.environ,
        PATH=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        PYTHONPATH=str(ROOT),
        DEVICES="2",
    )
    return subprocess.run(
        [LAUNCH / "two_processes.sh", *arguments, "--steps=3", *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_launch_two_processes_are_one_run(arguments, tmp_path):
    done = _two_processes(arguments, tmp_path, "--mesh=data=2,fsdp=2", "--eval-every=0")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["utilisation"]["chips"] == 4
    # Bad input of both ends both.
    done = _two_processes(arguments, tmp_path, "--mesh=data=3")
    assert done.returncode == 2
    assert "data=3" in done.stderr
    assert "Traceback" not in done.stderr
