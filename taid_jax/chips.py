"""What chips can do at best, and the shapes that TPUs come in."""

import dataclasses
from collections.abc import Mapping

_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, as its maker describes it.

    Attributes:
        flops: Peak of bfloat16 products, per second.
        hbm_bandwidth: Bytes per second.
        link_bandwidth: Bytes per second that the chip can send to its neighbours.
        hbm_bytes: Memory that a program can have.
        topologies: Shapes of the slices that are offered.
        kinds: What JAX calls such a device.
        config: Name of the core arrangement for the compiler; the default when empty.
    """

    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    hbm_bytes: int
    topologies: tuple[str, ...]
    kinds: tuple[str, ...]
    config: str = ""


def _gib(amount: float) -> int:
    return int(amount * 2**30)


# Peak, memory bandwidth and links: https://cloud.google.com/tpu/docs/v4, .../v5e,
# .../v5p and .../v6e, "System architecture". The links are given there for both
# directions together (v4 in the older unit: 2,400 Gbit/s one way); here it is what a
# chip sends, half of that. The memory is what the compiler of libtpu 0.0.42 names as
# available when a program needs more: the runtime keeps the rest of the chip's 32, 16,
# 95 and 32 GB.
CHIPS: Mapping[str, Chip] = {
    # A v4 chip has two cores; as one device ("megacore") they share its memory.
    "v4": Chip(275e12, 1228e9, 300e9, _gib(30.75), _CUBE, ("TPU v4",), "megacore"),
    "v5e": Chip(197e12, 819e9, 200e9, _gib(15.75), _PLANE, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(459e12, 2765e9, 600e9, _gib(95.74), _CUBE, ("TPU v5", "TPU v5p")),
    "v6e": Chip(918e12, 1640e9, 400e9, _gib(31.25), _PLANE, ("TPU v6 lite", "TPU v6e")),
}

# Peak of dense bfloat16 products, from NVIDIA's data sheets of each card (the figures
# marked "with sparsity" there are twice as high). Names as the driver gives them.
_GPU_FLOPS: Mapping[str, float] = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 990e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(kind: str) -> float | None:
    """Returns the peak of bfloat16 products per second; None for unknown devices.

    Args:
        kind: What JAX calls the device: `device.device_kind`.
    """
    for chip in CHIPS.values():
        if kind in chip.kinds:
            return chip.flops
    names = (name for name in _GPU_FLOPS if kind == name or _is_variant(kind, name))
    found = max(names, key=len, default=None)
    return None if found is None else _GPU_FLOPS[found]


def _is_variant(kind: str, name: str) -> bool:
    """Returns whether more about the same card follows its name."""
    return kind.startswith((f"{name} ", f"{name}-"))
