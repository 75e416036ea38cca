"""Files and folders that are seen whole or not at all, whenever the process dies."""

import contextlib
import fcntl
import os
import pathlib
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator

from taid_jax.errors import InputError, explain, show

LOCK = ".lock"
"""In a folder that one living process holds."""

HALF_WRITTEN = re.compile(r"\.[0-9a-f]{16}\.(partial|old)")
"""Names of the folders that a killed `folder_aside` leaves behind."""


@contextlib.contextmanager
def written_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to, which takes the place of `path` when all is written.

    What is left of a writer that failed, or was killed, ends in `.partial`.
    """
    part = path.with_name(path.name + ".partial")
    yield part
    _flush(part)
    part.replace(path)


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file that is seen whole or not at all."""
    with written_aside(path) as part:
        part.write_bytes(data)


def hold_folder(folder: pathlib.Path) -> tuple[int, str | None]:
    """Makes a folder if it is not there, and holds it for this process.

    By a lock of the operating system on a file in it, which ends with the process,
    however it ends. Over NFS that needs a server that has locks.

    Returns:
        What to `os.close` to let go of it; and a line for the user where there are no
        locks.

    Raises:
        InputError: If it cannot be made, or another living process holds it.
    """
    lock, note = folder / LOCK, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except (OSError, ValueError) as error:
        raise InputError(
            f"output: cannot make {show(str(lock))}: {explain(error)}"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        raise InputError(
            f"output: another run writes into {folder} ({holder or 'unknown'}); "
            "wait for its end or stop it, or choose another --output"
        ) from error
    except OSError as error:
        note = (
            f"{lock} cannot be locked ({explain(error)}): take care that no other "
            "run writes into this folder"
        )
    with contextlib.suppress(OSError):  # It only tells others who has the lock.
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle, note


@contextlib.contextmanager
def folder_aside(
    path: pathlib.Path, check: Callable[[], None]
) -> Iterator[pathlib.Path]:
    """Gives a new folder to fill, which takes the place of `path` when all is written.

    What stood there comes back if that fails; what is left of a writer that was killed
    is called as `HALF_WRITTEN` says.

    Args:
        path: The folder; what it is in is made too.
        check: Raises if what stands there must not be replaced. Asked when all is
            written, as it may have been filled meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the folder's name, which may be as long as names can be.
    part = path.with_name(f".{secrets.token_hex(8)}.partial")
    old = part.with_suffix(".old")
    part.mkdir()
    try:
        yield part
        for each in (*part.rglob("*"), part):
            _flush(each)
        check()
        if path.is_dir():
            path.rename(old)
        part.rename(path)
        _flush(path.parent)
    except BaseException:
        if old.is_dir() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: pathlib.Path) -> None:
    """Makes sure that a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
