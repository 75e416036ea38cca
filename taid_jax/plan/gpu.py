"""What XLA's compiler for GPUs is told of a GPU that is not there."""

import contextlib
from collections.abc import Mapping

from taid_jax.chips import GPUS
from taid_jax.errors import show

GPUS_PER_HOST: Mapping[str, int] = dict.fromkeys(GPUS, 8) | {"gb200": 4}
"""GPUs of an HGX board, and of a tray of GB200 NVL72."""

LINKED_HOSTS: Mapping[str, int] = dict.fromkeys(GPUS, 1) | {"gb200": 18}
"""Hosts that NVLink joins; where they are more than one, the trays of a rack."""

_SHARE = 0.75
"""Of a GPU's memory that JAX takes: docs.jax.dev, "GPU memory allocation"."""

_DNN, _CUDA = "major: 9 minor: 12", "major: 13 minor: 0"
"""Versions of cuDNN and CUDA: of what `jax[cuda13]` 0.10.2 asks for, the oldest."""

# Multiprocessors, of each the float32 units and bytes of shared memory, of all bytes of
# L2 cache and GHz at most, and compute capability. NVIDIA's architecture whitepapers
# (A100, H100, Blackwell) and "CUDA C++ Programming Guide", compute capabilities; as the
# driver reports them: XLA's target configurations, github.com/openxla/xla,
# xla/backends/gpu/target_config/specs. The `a` of 9.0a and 10.0a is what the feature
# extension says: instructions of that generation alone, as the real device has them.
_BUILT = {
    "a100": ("NVIDIA A100-SXM4-80GB", 108, 64, 167_936, 41_943_040, 1.41, 8),
    "h100": ("NVIDIA H100 80GB HBM3", 132, 128, 233_472, 52_428_800, 1.98, 9),
    "h200": ("NVIDIA H200", 132, 128, 233_472, 52_428_800, 1.98, 9),
    "b200": ("NVIDIA B200", 148, 128, 233_472, 132_644_864, 1.965, 10),
    "gb200": ("NVIDIA GB200", 152, 128, 233_472, 135_528_448, 2.062, 10),
}


def describe_gpu(name: str) -> str:
    """Returns a GPU as XLA's text form of `stream_executor.GpuTargetConfigProto`."""
    chip = GPUS[name]
    title, cores, units, shared, cache, clock, major = _BUILT[name]
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared - 1024}
  core_count: {cores}
  fpus_per_core: {units}
  clock_rate_ghz: {clock}
  l2_cache_size: {cache}
  memory_bandwidth: {int(chip.hbm_bandwidth)}
  device_memory_size: {chip.hbm_bytes}
  cuda_compute_capability {{ major: {major} feature_extension: {extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ {_DNN} }}
runtime_version {{ {_CUDA} }}
device_description_str: "{title}"
"""


def usable_share(environment: Mapping[str, str]) -> float:
    """Returns what part of a GPU's memory JAX would take, by the environment.

    Raises:
        ValueError: If it says something else than a part.
    """
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if text := environment.get(name):
            with contextlib.suppress(ValueError):
                if 0 < float(text) <= 1:
                    return float(text)
            raise ValueError(
                f"{name}: need a number above 0, up to 1, got {show(text)}"
            )
    return _SHARE
