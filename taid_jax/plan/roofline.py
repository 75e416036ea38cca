"""The least time of a step, by resource and by part: a bound, not a forecast."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from taid_jax.chips import Chip
from taid_jax.plan.collectives import Collectives
from taid_jax.plan.program import Part

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


def work_of_parts(
    flops: Mapping[Part, int],
    devices: int,
    traffic: Mapping[Part, int],
    collectives: Collectives,
) -> dict[Part, Work]:
    """Returns the work of each part of the step.

    Args:
        flops: Of matrix products, over all devices.
        devices: How many share them.
        traffic: Bytes read and written by one.
        collectives: What one exchanges.
    """
    return {
        part: Work(
            flops.get(part, 0) / devices,
            traffic.get(part, 0),
            *collectives.parts.get(part, (0.0, 0.0)),
        )
        for part in get_args(Part)
    }


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
