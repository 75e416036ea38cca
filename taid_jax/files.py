"""Files and folders that are seen whole or not at all, whenever the process dies."""

import contextlib
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterator

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
