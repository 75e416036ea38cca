"""From the name of a machine to its devices, there or not."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from taid_jax.chips import CHIPS, GPUS, Chip
from taid_jax.errors import InputError, explain, how_to_install, show
from taid_jax.models.memory import host_memory
from taid_jax.plan.gpu import GPUS_PER_HOST, LINKED_HOSTS, describe_gpu, usable_share

LOCAL = "local"

# libtpu looks for a TPU's metadata, its neighbours and a lock when it is loaded; to
# compile alone it needs none of them. A TPU virtual machine has set its own already.
_COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Warnings are wanted: the partitioner's are counted.
    "TPU_MIN_LOG_LEVEL": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
}


class PlanError(InputError):
    """A machine that is not known, or a plan that cannot be made for it."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for.

    Attributes:
        name: As the user gave it.
        devices: As JAX would see them.
        hbm_bytes: Memory of a device that a program can have.
        chip: Its speed; None where it is not known.
        linked: How many devices in a row links join; all when None.
        notes: What the reader of a plan should know of it.
    """

    name: str
    devices: Sequence[Any]
    hbm_bytes: int
    chip: Chip | None
    linked: int | None = None
    notes: Sequence[str] = ()


def known_machines() -> str:
    """Returns all names of machines, for messages."""
    # One list of shapes for all chips that have them.
    shapes = dict.fromkeys(chip.topologies for chip in CHIPS.values())
    tpus = (
        f"{_alternatives(name for name in CHIPS if CHIPS[name].topologies == these)}:"
        f"{_alternatives(these)}"
        for these in shapes
    )
    gpus = (
        f"{_alternatives(name for name in GPUS if GPUS_PER_HOST[name] == most)}:N or "
        f":HOSTSxN for N of at most {most} GPUs a host"
        for most in dict.fromkeys(GPUS_PER_HOST.values())
    )
    return ", ".join([*tpus, *gpus, f"{LOCAL}:N for N devices of this machine"])


def _alternatives(names: Iterable[str]) -> str:
    found = [*names]
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"


def find_machine(name: str) -> Machine:
    """Returns the machine of a name such as `v5e:8x8`, `h100:8x8` or `local:8`.

    Raises:
        PlanError: If there is none of that name (with the known ones), its compiler is
            not installed, or there are fewer local devices than that.
    """
    kind, _, shape = name.partition(":")
    if kind == LOCAL and re.fullmatch(r"[1-9]\d{0,5}", shape):
        return _local(name, int(shape))
    if kind in CHIPS and shape in CHIPS[kind].topologies:
        return _tpu(name, CHIPS[kind], shape)
    if kind in GPUS and (sizes := re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-8])", shape)):
        hosts, gpus = int(sizes[1] or 1), int(sizes[2])
        if gpus <= GPUS_PER_HOST[kind]:
            return _gpu(name, kind, hosts, gpus)
    raise PlanError(
        f"plan: no machine is called {show(name)}; known: {known_machines()}"
    )


def _tpu(name: str, chip: Chip, shape: str) -> Machine:
    for key, value in _COMPILE_ONLY.items():
        os.environ.setdefault(key, value)
    # The compiler is all that is wanted of a TPU, even where there is one.
    jax.config.update("jax_platforms", "cpu")
    options: dict[str, str | tuple[int, ...]] = {}
    if chip.config:
        options["chip_config_name"] = chip.config
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        ).devices
    except RuntimeError as error:
        raise PlanError(
            f"plan: the TPU compiler cannot be had: {explain(error)}. It comes with "
            f"libtpu: {how_to_install('tpu')}"
        ) from error
    return Machine(name, devices, chip.hbm_bytes, chip)


def _gpu(name: str, kind: str, hosts: int, gpus: int) -> Machine:
    # As above; JAX then also leaves CUDA's driver alone.
    jax.config.update("jax_platforms", "cpu")
    try:
        share = usable_share(os.environ)
        devices = topologies.get_topology_desc(
            platform="cuda",
            target_config=describe_gpu(kind),
            topology=f"1x{hosts}x{gpus}",
        ).devices
    except ValueError as error:
        raise PlanError(f"plan: {explain(error)}") from error
    except RuntimeError as error:
        raise PlanError(
            f"plan: the GPU compiler cannot be had: {explain(error)}. It comes with "
            f"JAX's CUDA plugin: {how_to_install('cuda')}"
        ) from error
    chip = GPUS[kind]
    note = (
        f"JAX takes {share:.0%} of a GPU's {chip.hbm_bytes / 2**30:.1f} GiB; "
        "XLA_CLIENT_MEM_FRACTION=0.92, here and in the run, gives a program more"
    )
    linked = gpus * LINKED_HOSTS[kind]
    return Machine(
        name,
        devices,
        int(share * chip.hbm_bytes),
        chip,
        linked if linked < len(devices) else None,
        (note,),
    )


def _local(name: str, count: int) -> Machine:
    with contextlib.suppress(RuntimeError):  # JAX has counted its devices already.
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if count > len(devices):
        raise PlanError(
            f"plan: {name} needs {count} devices, this machine has {len(devices)}; "
            f"JAX_NUM_CPU_DEVICES={count} JAX_PLATFORMS=cpu makes as many of a CPU"
        )
    stats = devices[0].memory_stats() or {}
    limit = stats.get("bytes_limit", host_memory() // count)
    return Machine(name, devices[:count], limit, None)
