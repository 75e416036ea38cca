"""The output folder of a run: when it may be had, and who has it."""

import errno
import os
import pathlib
import subprocess
import sys
import types

import pytest

from taid_jax import files
from taid_jax.settings import SettingsError, from_dict
from taid_jax.train import folder as f


def _open(path, **values):
    return f.RunFolder(from_dict({"output": str(path), **values}).run)


def _fill(folder, *names):
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")


EARLY = ("settings.json", "metrics.jsonl", "evaluations.jsonl", "tensorboard/events")
HALF = "checkpoints/3.orbax-checkpoint-tmp/state/d/piece"


@pytest.mark.parametrize(
    ("names", "plain", "resumed"),
    [
        ((), None, None),
        (("plan.json", ".lock"), None, None),
        # Killed before the first save: each of the two ways says what works.
        (("settings.json",), "--resume starts it anew", None),
        (EARLY, "--resume starts it anew", None),
        ((*EARLY, "checkpoints/"), "--resume starts it anew", None),
        ((*EARLY, HALF), "--resume starts it anew", None),
        (
            (*EARLY, "metrics.jsonl.partial", "notes.txt"),
            "--resume starts it anew",
            None,
        ),
        (("tensorboard/", "set_aside/9/"), "--resume starts it anew", None),
        ((*EARLY, "checkpoints/3/_METADATA"), "Go on .* by --resume", None),
        # Somebody's own files, or a student whose checkpoints are gone.
        (("precious.txt",), "precious.txt.*has no checkpoint", "precious.txt"),
        (("checkpoints/", "precious.txt"), "precious.txt", "precious.txt"),
        ((*EARLY, "report.json", "student/config.json"), "report.json", "report.json"),
    ],
)
def test_check_says_what_works_and_changes_nothing(tmp_path, names, plain, resumed):
    _fill(tmp_path, *names)
    before = sorted(tmp_path.rglob("*"))
    for resume, message in ((False, plain), (True, resumed)):
        output = _open(tmp_path, resume=resume)
        if message is None:
            output.check()
        else:
            with pytest.raises(SettingsError, match=message):
                output.check()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a/b/c", "\0", "x" * 300, "file/sub", "\udcff\ud800"])
def test_check_of_a_folder_that_is_not_there_makes_none(tmp_path, name):
    (tmp_path / "file").write_text("")
    if name == "a/b/c":
        _open(tmp_path / name).check()
    else:
        # Some names are refused by the settings already.
        with pytest.raises(SettingsError, match=r"output: .{1,800}$"):
            _open(tmp_path / name).check()
    assert os.listdir(tmp_path) == ["file"]


def test_check_of_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(f.tempfile, "TemporaryFile", refuse)
    with pytest.raises(SettingsError, match=r"cannot be written.*Read-only"):
        _open(tmp_path / "run").check()


def test_claim_makes_the_folder_and_lets_nobody_else_in(tmp_path):
    output = _open(tmp_path / "a" / "run")
    output.claim()
    output.claim()
    for resume in (False, True):
        with pytest.raises(SettingsError, match=rf"process {os.getpid()} on .*another"):
            _open(output.path, resume=resume).claim()
    output.close()
    again = _open(output.path)
    again.claim()
    again.close()
    assert not output.notes + again.notes


HOLDER = """
import sys
from taid_jax.settings import from_dict
from taid_jax.train.folder import RunFolder
output = RunFolder(from_dict({"output": sys.argv[1]}).run)
output.claim()
print("held", flush=True)
sys.stdin.read()
"""


def test_claim_of_a_killed_process_ends_with_it(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=os.pathsep.join(sys.path)),
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(SettingsError, match=f"process {holder.pid} on"):
            _open(tmp_path).claim()
        holder.kill()
    output = _open(tmp_path)
    output.claim()
    output.close()


def test_claim_sees_what_came_since_it_was_looked_at(tmp_path):
    output = _open(tmp_path)
    output.check()
    _fill(tmp_path, "settings.json")
    with pytest.raises(SettingsError, match="--resume starts it anew"):
        output.claim()
    _open(tmp_path, resume=True).claim()  # Nobody holds it.


def test_claim_where_there_are_no_locks_says_so(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    output = _open(tmp_path)
    output.claim()
    output.close()
    (line,) = output.notes
    assert "No locks available" in line


def test_claim_clears_what_a_killed_process_left_half_done(tmp_path):
    _fill(tmp_path, *EARLY, HALF, ".student.mine", "checkpoints/notes.txt")
    output = _open(tmp_path, resume=True)
    output.claim()
    output.close()
    assert not list(tmp_path.rglob("*orbax*"))
    assert (tmp_path / ".student.mine").exists()
    assert (tmp_path / "checkpoints" / "notes.txt").exists()


def test_claim_clears_an_export_that_was_killed(tmp_path, monkeypatch):
    """Between its two renames: the older student has lost its name."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    rename = pathlib.Path.rename

    def first_alone(path, target):
        if path.name != "student":
            raise KeyboardInterrupt
        rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", first_alone)
        none = types.SimpleNamespace(rmtree=lambda path, ignore_errors: None)
        patch.setattr(files, "shutil", none)
        with (
            pytest.raises(KeyboardInterrupt),
            files.folder_aside(tmp_path / "student", lambda: None),
        ):
            pass
    assert len(list(tmp_path.iterdir())) == 2
    output = _open(tmp_path, resume=True)
    output.claim()
    output.close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_set_aside_never_overwrites(tmp_path):
    output = _open(tmp_path)
    for text in ("one", "two", "three"):
        (tmp_path / "9").write_text(text)
        output.set_aside(tmp_path / "9", "is text")
    texts = {path.name: path.read_text() for path in (tmp_path / "set_aside").iterdir()}
    assert texts == {"9": "one", "9-2": "two", "9-3": "three"}
    assert len(output.notes) == 3


def test_way_on_is_true_at_any_moment(tmp_path):
    assert "--resume starts anew" in f.way_on(tmp_path / "nowhere")
    _fill(tmp_path, *EARLY, HALF)
    assert "No checkpoint was saved" in f.way_on(tmp_path)
    _fill(tmp_path, "checkpoints/3/x", "checkpoints/12/x", "checkpoints/9/x")
    assert "checkpoint is 12" in f.way_on(tmp_path)
