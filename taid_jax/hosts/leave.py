"""Ending together: what a process says when it goes, and what it hears of others."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import jax

from taid_jax.hosts.talk import is_first, store

_ENDED = "taid_jax/ended"
_WAIT_MS = 365 * 24 * 3600 * 1000
# A process that hears of another's end has this long to come to an end of its own:
# what stopped one may stop all, and each then says so itself.
_GRACE_SECONDS = 3

_GO_ON = "The last whole checkpoint is intact: start all processes again, with --resume"

# Reads until this process is gone; speaks unless it was told that all is well.
_LAST_WORDS = """
import sys
if not sys.stdin.buffer.read():
    sys.stderr.write(sys.argv[1])
"""


class _LastWords:
    """Speaks for this process when it ends in a way that Python cannot see.

    That is by SIGKILL, or by JAX, which aborts a process whose company is gone. A small
    process waits for the end of a pipe that only this process holds.
    """

    def __init__(self, text: str):
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAST_WORDS, text],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it.
        )

    def not_needed(self) -> None:
        """Lets the small process end without a word."""
        self._child.communicate(b"all is well")


_last_words: _LastWords | None = None
_leaving = threading.Event()


def watch() -> None:
    """Begins to listen for the end of other processes; once, after joining."""
    global _last_words
    here, count = jax.process_index(), jax.process_count()
    _last_words = _LastWords(
        f"error: process {here} of {count} came to an end before its work was done: "
        "it was killed, or JAX ended it because another process is gone (what JAX "
        f"wrote says which). {_GO_ON}\n"
    )
    threading.Thread(target=_listen, args=(store(),), daemon=True).start()


def _listen(values: Any) -> None:
    try:
        said = values.blocking_key_value_get(_ENDED, _WAIT_MS)
    except Exception:
        return  # The store is closed: this process is at its own end.
    process, status, why = json.loads(said)
    time.sleep(_GRACE_SECONDS)
    if not _leaving.is_set():
        _end(status, f"error: process {process} ended: {why}\n")


def _end(status: int, text: str) -> None:
    """Ends the process here and now: JAX's own end would wait for the others."""
    if _last_words is not None:
        _last_words.not_needed()
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(status)


def is_alone() -> bool:
    """Returns whether no other process takes part in this run."""
    return _last_words is None


def explain_loss(error: Exception) -> str | None:
    """Returns what an error says in words, if it means that another process is gone.

    Args:
        error: That ended a step of a run of several processes.
    """
    text = str(error)
    # Of Gloo, NCCL and JAX's own services, in this order.
    signs = ("gloo", "Connection ", "NCCL", "UNAVAILABLE", "coordination", "heartbeat")
    if not isinstance(error, jax.errors.JaxRuntimeError) or not any(
        sign in text for sign in signs
    ):
        return None
    return (
        f"process {jax.process_index()} of {jax.process_count()} lost another one: "
        f"{text.splitlines()[0]}. {_GO_ON}"
    )


def leave(status: int, why: str) -> int:
    """Returns the exit status; of several processes, ends this one and the others too.

    Args:
        status: Exit status, not 0.
        why: Told to the other processes; this one has shown it already.
    """
    if is_alone():
        return status
    _leaving.set()
    # It cannot be said when another was first, or the company is gone.
    with contextlib.suppress(Exception):
        store().key_value_set(_ENDED, json.dumps([jax.process_index(), status, why]))
    if is_first():
        time.sleep(_GRACE_SECONDS + 1)  # What was said is kept by this process.
    _end(status, "")
    return status


def finish() -> None:
    """Waits for the other processes and parts from them; all work is done."""
    global _last_words
    if _last_words is None:
        return
    # Process 0 may have a model to write while the others are done.
    store().wait_at_barrier("taid_jax/finish", 24 * 3600 * 1000)
    jax.distributed.shutdown()
    _last_words.not_needed()
    _last_words = None
