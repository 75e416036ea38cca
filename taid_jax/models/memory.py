"""Whether models fit in memory: asked before anything of them is made."""

import contextlib
import math
import os
import pathlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import Sharding
from jax.typing import DTypeLike

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params

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


class Need(NamedTuple):
    """What something takes on the devices of this process.

    Attributes:
        what: Its name, for messages.
        bytes: Device to bytes.
    """

    what: str
    bytes: Counter[Any]


def params_need(
    what: str, config: DecoderConfig, dtype: DTypeLike, where: Any, *, copies: int = 1
) -> Need:
    """Returns what the parameters of a model take, each device's part of them.

    `where` is one sharding for all, a tree of them, or None for the default device;
    there are `copies` arrays like each parameter.
    """
    found: Counter[Any] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        sharding = sharding_of(where, [str(key.key) for key in path])
        width = copies * jax.numpy.dtype(dtype).itemsize
        devices, shape = jax.local_devices()[:1], leaf.shape
        if sharding is not None:
            devices, shape = sharding.addressable_devices, sharding.shard_shape(shape)
        for device in devices:
            found[device] += width * math.prod(shape)
    return Need(what, found)


def sharding_of(where: Any, path: Iterable[str]) -> Sharding | None:
    """Returns where a parameter goes; None for the default device."""
    if where is None or isinstance(where, Sharding):
        return where
    for key in path:
        where = where[key]
    return where


def check_fits(*needs: Need) -> None:
    """Raises if what is needed together is more than there is.

    Devices that are processors share the memory of their host; others have their own.

    Raises:
        ModelError: With what is needed, each by its name, and what there is.
    """
    shares: dict[str, Counter[str]] = {}
    devices: dict[str, Any] = {}
    for need in needs:
        for device, size in need.bytes.items():
            place = _HOST if device.platform == "cpu" else str(device)
            devices[place] = device
            shares.setdefault(place, Counter())[need.what] += size
    for place, by_name in sorted(shares.items()):
        free = host_memory() if place == _HOST else _device_memory(devices[place])
        if free is None or by_name.total() <= free:
            continue
        lines = ", ".join(f"{_gib(size)} for {what}" for what, size in by_name.items())
        raise ModelError(
            f"not enough memory: need {lines}; {place} has {_gib(free)}. "
            "Give a smaller model, a dtype of fewer bytes, or a mesh of more devices"
        )


_HOST = "this host"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _device_memory(device: Any) -> int | None:
    """Returns what a device has left, None when it does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
