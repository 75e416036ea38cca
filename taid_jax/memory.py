"""How much memory there is, to refuse what cannot fit before anything is made."""

import contextlib
import os
import pathlib

# Of a container: version 2 of Linux' control groups, then version 1.
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


def host_memory(groups: str | pathlib.Path = "/sys/fs/cgroup") -> int:
    """Returns the bytes that this process can have: the machine's, or its container's.

    Args:
        groups: Where the limits of containers are.
    """
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _LIMITS:
        # Without a limit there is no such file, or it says `max`.
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(pathlib.Path(groups, name).read_text("ascii")))
    return found
