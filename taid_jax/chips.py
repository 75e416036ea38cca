"""What accelerators can do at best, and the shapes that TPUs come in."""

import dataclasses
from collections.abc import Mapping

_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of JAX's, as its maker describes it: a chip, a GPU, a TPU7x core.

    Attributes:
        flops: Peak of dense bfloat16 products, per second.
        hbm_bandwidth: Bytes per second.
        link_bandwidth: Bytes per second that it can send to its neighbours: over a
            TPU's own network, or over NVLink.
        hbm_bytes: Memory; of a TPU what a program can have, of a GPU what the driver
            reports.
        topologies: Shapes of the slices that are offered; none of a GPU.
        kinds: What JAX calls such a device.
        config: Name of the core arrangement for the compiler; the default when empty.
        network_bandwidth: Bytes per second that it can send where the links do not
            reach.
    """

    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    hbm_bytes: int
    topologies: tuple[str, ...]
    kinds: tuple[str, ...]
    config: str = ""
    network_bandwidth: float | None = None


def _gib(amount: float) -> int:
    return int(amount * 2**30)


# Peak, memory bandwidth and links: https://cloud.google.com/tpu/docs/v4, .../v5e,
# .../v5p, .../v6e and .../tpu7x, "System architecture". The links are given there for
# both directions together (v4 in the older unit: 2,400 Gbit/s one way); here it is what
# a chip sends, half of that. The memory is what the compiler of libtpu 0.0.42 names as
# available when a program needs more: the runtime keeps the rest of the chip's 32, 16,
# 95, 32 and 192 GB.
CHIPS: Mapping[str, Chip] = {
    # A v4 chip has two cores; as one device ("megacore") they share its memory.
    "v4": Chip(275e12, 1228e9, 300e9, _gib(30.75), _CUBE, ("TPU v4",), "megacore"),
    "v5e": Chip(197e12, 819e9, 200e9, _gib(15.75), _PLANE, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(459e12, 2765e9, 600e9, _gib(95.74), _CUBE, ("TPU v5", "TPU v5p")),
    "v6e": Chip(918e12, 1640e9, 400e9, _gib(31.25), _PLANE, ("TPU v6 lite", "TPU v6e")),
    # Each of the two cores of a chip is a device, and has half of what the chip has.
    "tpu7x": Chip(1153.5e12, 3690e9, 300e9, _gib(94.75), _CUBE, ("TPU7x",)),
}

# Peak, memory bandwidth, NVLink (half of what is given for both directions): NVIDIA's
# data sheets "A100 80GB" (SXM), "H100" (SXM), "H200" (SXM), "HGX B200" and "GB200
# NVL72" (72 GPUs: 360 PFLOP/s with sparsity, 576 TB/s); figures "with sparsity" are
# twice the dense ones. Network: a port of each GPU in "DGX A100" (200 Gbit/s), "DGX
# H100", "DGX H200", "DGX B200" and "DGX GB200" (400 Gbit/s). Memory as the driver
# reports it: XLA's target configurations, github.com/openxla/xla,
# xla/backends/gpu/target_config/specs.
GPUS: Mapping[str, Chip] = {
    name: Chip(flops, hbm, links, memory, (), (kind,), network_bandwidth=network)
    for name, kind, flops, hbm, links, network, memory in (
        ("a100", "NVIDIA A100", 312e12, 2039e9, 300e9, 25e9, 85_100_068_864),
        ("h100", "NVIDIA H100 80GB HBM3", 989e12, 3350e9, 450e9, 50e9, 84_942_979_072),
        ("h200", "NVIDIA H200", 989e12, 4800e9, 450e9, 50e9, 151_397_597_184),
        ("b200", "NVIDIA B200", 2250e12, 7700e9, 900e9, 50e9, 191_514_411_008),
        ("gb200", "NVIDIA GB200", 2500e12, 8000e9, 900e9, 50e9, 197_897_748_480),
    )
}

# Peak of others, from the data sheet of each card. Names as the driver gives them.
_GPU_FLOPS: Mapping[str, float] = {
    **{kind: chip.flops for chip in GPUS.values() for kind in chip.kinds},
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 990e12,
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
