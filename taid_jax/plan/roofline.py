"""The least time of a step, by resource and by part: a bound, not a forecast."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from taid_jax.chips import Chip

Resource = Literal["flops", "hbm", "interconnect", "network"]


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in a step, or a part of one.

    Attributes:
        flops: Of matrix products, those of all devices shared out evenly.
        bytes: That its kernels read and write in its memory.
        sent: Bytes over its links.
        sent_network: Bytes where its links do not reach.
    """

    flops: float
    bytes: int
    sent: float
    sent_network: float


def least_seconds(chip: Chip | None, parts: Iterable[Work]) -> dict[Resource, float]:
    """Returns the time that each resource in use needs at least, in seconds.

    Nothing for unknown chips.
    """
    if chip is None:
        return {}
    work = [dataclasses.astuple(part) for part in parts]
    speeds: dict[Resource, float | None] = {
        "flops": chip.flops,
        "hbm": chip.hbm_bandwidth,
        "interconnect": chip.link_bandwidth,
        "network": chip.network_bandwidth,
    }
    return {
        resource: sum(amounts) / speed
        for (resource, speed), amounts in zip(
            speeds.items(), zip(*work, strict=True), strict=True
        )
        if speed and any(amounts)
    }
