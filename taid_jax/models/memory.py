"""Whether models fit in memory: asked before anything of them is made."""

import math
import os
import pathlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import Sharding
from jax.typing import DTypeLike

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params
from taid_jax.models.errors import ModelError

_CGROUPS = (
    # Version 2, then 1: the limit, what is used, and of what.
    ("memory.max", "memory.current", "memory.stat"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
    ),
)


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

    Args:
        what: Of the model.
        config: The architecture.
        dtype: Of the parameters.
        where: One sharding for all, a tree of them, or None for the default device.
        copies: So many arrays like each parameter there are.
    """
    found: Counter[Any] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        sharding = sharding_of(where, [str(key.key) for key in path])
        width = copies * jax.numpy.dtype(dtype).itemsize
        if sharding is None:
            found[jax.local_devices()[0]] += width * math.prod(leaf.shape)
            continue
        for device, index in sharding.addressable_devices_indices_map(
            leaf.shape
        ).items():
            cuts = zip(index or (), leaf.shape, strict=True)
            found[device] += width * math.prod(
                len(range(*cut.indices(size))) for cut, size in cuts
            )
    return Need(what, found)


def sharding_of(where: Any, path: Iterable[str]) -> Sharding | None:
    """Returns where a parameter goes; None for the default device."""
    if where is None or isinstance(where, Sharding):
        return where
    for key in path:
        where = where[key]
    return where


def check_memory(*needs: Need) -> None:
    """Raises if what is needed together is more than there is.

    Devices that are processors share the memory of their host; others have their own.

    Raises:
        ModelError: With what is needed, each by its name, and what there is.
    """
    for place in sorted({_place(device) for need in needs for device in need.bytes}):
        shares = {
            need.what: sum(n for each, n in need.bytes.items() if _place(each) == place)
            for need in needs
        }
        free = host_memory() if place == _HOST else _device_memory(place, needs)
        if free is None or sum(shares.values()) <= free:
            continue
        lines = ", ".join(f"{_gib(size)} for {what}" for what, size in shares.items())
        raise ModelError(
            f"not enough memory: need {lines}; {place} has {_gib(free)} available. "
            "Give a smaller model, a dtype of fewer bytes, or a mesh of more devices"
        )


_HOST = "this host"


def _place(device: Any) -> str:
    return _HOST if device.platform == "cpu" else str(device)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _device_memory(place: str, needs: Iterable[Need]) -> int | None:
    """Returns what a device has left, None when it does not say."""
    devices = (device for need in needs for device in need.bytes)
    device = next(each for each in devices if str(each) == place)
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def host_memory(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Returns the bytes that this process may still use, None when unknown.

    What the kernel has available, swap included, or what the control group allows.

    Args:
        root: Where the kernel tells, under `proc` and `sys`.
    """
    memory = _numbers(root / "proc" / "meminfo")
    swap = 1024 * memory.get("SwapFree:", 0)
    found = []
    if "MemAvailable:" in memory:
        found.append(1024 * memory["MemAvailable:"] + swap)
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for names in _CGROUPS:
        limit, used, stat = (root / "sys/fs/cgroup" / name for name in names)
        try:
            most, now = int(limit.read_text()), int(used.read_text())
        except (OSError, ValueError):  # No such version; "max" is no limit.
            continue
        cached = _numbers(stat)
        kept = sum(cached.get(f"{kind}active_file", 0) for kind in ("", "in"))
        found.append(most - now + kept + swap)
    return min(found, default=None)


def _numbers(path: pathlib.Path) -> dict[str, int]:
    """Returns the lines of a file of the kernel: a name and a number each."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
        return {line[0]: int(line[1]) for line in lines if len(line) >= 2}
    except (OSError, ValueError):
        return {}
