"""Tasks shared out; how errors come back."""

import os
import pickle
import signal
import subprocess
import sys

import pytest

from taid_jax.data.chat import MissingTemplateError
from taid_jax.data.errors import DataError
from taid_jax.data.prepare import parallel


def fail(ready):
    raise MissingTemplateError


def describe(ready, number):
    return ready, number, os.environ["TOKENIZERS_PARALLELISM"]


def test_run_all_stays_here_with_one_worker():
    made = []
    found = parallel.run_all(
        lambda ready, number: (ready, number),
        [(1,), (2,)],
        workers=1,
        make_ready=lambda name: made.append(name) or name,
        ready_arguments=("a",),
    )
    assert list(found) == [("a", 1), ("a", 2)]
    assert made == ["a"]


def test_run_all_of_nothing_makes_nothing_ready():
    found = parallel.run_all(
        describe, [], workers=4, make_ready=fail, ready_arguments=()
    )
    assert list(found) == []


def test_tasks_of_other_processes_raise_what_can_be_sent(monkeypatch):
    """Not every subclass of DataError can be made again from its message alone."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    parallel._start(str, ("a",))
    assert parallel._run(describe, (3,)) == ("a", 3, "false")
    with pytest.raises(DataError, match="--chat-template") as caught:
        parallel._run(fail, ())
    assert type(caught.value) is DataError
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


ENDLESS = """
import os, threading
from taid_jax.data.prepare.parallel import run_all

def wait(ready):
    os.write(1, b"begun\\n")
    threading.Event().wait()

if __name__ == "__main__":
    list(run_all(wait, [(), ()], workers=2, make_ready=int, ready_arguments=()))
"""


def test_run_all_leaves_no_process_behind_when_it_is_killed(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    with subprocess.Popen(
        [sys.executable, tmp_path / "endless.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"begun\n"
        assert parent.stdout.readline() == b"begun\n"
        parent.send_signal(signal.SIGKILL)
        # To its end: as long as a worker lives, it has this pipe open.
        assert parent.communicate(timeout=60)[0] == b""
