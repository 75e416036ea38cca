"""Files that are seen whole or not at all, whenever the process dies."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def written_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to, which takes the place of `path` when all is written.

    What is left of a writer that failed, or was killed, ends in `.partial`.
    """
    part = path.with_name(path.name + ".partial")
    yield part
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file that is seen whole or not at all."""
    with written_aside(path) as part:
        part.write_bytes(data)
