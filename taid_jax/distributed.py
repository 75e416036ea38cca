"""Several processes as one run, by JAX's own runtime.

Each process runs the same program. One that dies is noticed by JAX, which then ends the
others; the last whole checkpoint is intact, and all are started again with `--resume`.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from taid_jax.errors import InputError, explain, show
from taid_jax.settings import DistributedSettings, Settings, flatten

# Those that decide what is computed, what is read and what is written.
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
_MOST_LINES = 20

Value = TypeVar("Value")


class DistributedError(InputError):
    """The processes cannot be one run: one is missing, or they disagree."""


class PeerError(RuntimeError):
    """Process 0 could not make what all wait for; it says why itself."""


def initialize(settings: DistributedSettings) -> None:
    """Makes this process one of several, if it is; else does nothing.

    To be called before anything touches a device. Afterwards `jax.devices()` are those
    of all processes. Where one does not come in time, JAX ends the others.

    Args:
        settings: Which processes there are, or who says so.

    Raises:
        DistributedError: If the processes cannot be found, or this one is not let in.
    """
    if settings.coordinator is not None:
        if settings.num_processes == 1:
            return
        which: dict[str, Any] = {
            "coordinator_address": settings.coordinator,
            "num_processes": settings.num_processes,
            "process_id": settings.process_id,
            "cluster_detection_method": "deactivate",
        }
    elif settings.cluster == "none":
        return
    elif settings.cluster == "auto":
        if not several_expected(os.environ, getattr(jax.config, "jax_platforms", None)):
            return
        which = {}
    else:
        which = {"cluster_detection_method": settings.cluster}
    place = f"at {settings.coordinator}" if settings.coordinator else "of this cluster"
    sys.stderr.write(
        f"joining the other processes {place}, for at most {settings.join_timeout} s\n"
    )
    # Between CPUs; other devices have collectives of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **which,
            initialization_timeout=settings.join_timeout,
            heartbeat_timeout_seconds=settings.heartbeat_timeout,
            shutdown_timeout_seconds=max(60, settings.heartbeat_timeout),
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise DistributedError(
            f"this process cannot join the others: {explain(error).strip(' .')}. Give "
            "--coordinator HOST:PORT, --num-processes and --process-id, or --cluster "
            "none for a run of this process alone"
        ) from error


def shutdown() -> None:
    """Waits for the other processes and parts from them; the work of all is done."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def several_expected(environment: Mapping[str, str], platforms: str | None) -> bool:
    """Returns whether this process seems to be one of several started together.

    Asked first, because some of JAX's detection waits for servers that exist only
    there.

    Args:
        environment: Such as `os.environ`.
        platforms: Those that JAX may use, the first first, such as `cpu`; any if None.
    """

    def number(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() else 0

    slurm = {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys()
    # An indexed job; without an index JAX could not number the processes either.
    kubernetes = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"}
    if (
        (slurm and number("SLURM_NTASKS") > 1)
        or number("OMPI_COMM_WORLD_SIZE") > 1
        or kubernetes <= environment.keys()
    ):
        return True
    if (platforms or "tpu").split(",")[0] != "tpu":
        return False
    workers = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    if number("MEGASCALE_NUM_SLICES") > 1 or any(
        "," in environment.get(name, "") for name in workers
    ):
        return True
    # A TPU virtual machine: its metadata say whether it is one of several. JAX sets
    # this variable when it is imported where there is no TPU.
    has_tpu = "TPU_SKIP_MDS_QUERY" not in environment
    return has_tpu and importlib.util.find_spec("libtpu") is not None


def is_main_process() -> bool:
    """Returns whether this is the process that writes and prints: the only, or 0."""
    return jax.process_index() == 0


def broadcast(make: Callable[[], Value]) -> Value:
    """Returns on every process what process 0 makes; the others wait for it.

    Args:
        make: Called on process 0 only; gives what JSON can hold.

    Raises:
        Exception: On process 0, whatever `make` raises.
        DistributedError: On the others, with its message, when it is an `InputError`.
        PeerError: On the others, when it is anything else.
    """
    if jax.process_count() == 1:
        return make()
    failure: Exception | None = None
    said: dict[str, Any] = {}
    if is_main_process():
        try:
            said = {"value": make()}
        # Whatever it is: the others wait.
        except Exception as error:
            failure, bad_input = error, isinstance(error, InputError)
            said = {"error": explain(error), "input": bad_input}
    said = json.loads(_gather_bytes(json.dumps(said).encode())[0])
    if failure is not None:
        raise failure
    if "error" in said:
        kind = DistributedError if said["input"] else PeerError
        raise kind(f"process 0: {said['error']}")
    return said["value"]


def _gather_bytes(text: bytes) -> list[bytes]:
    """Returns on every process the texts of all, in their order."""
    size = np.asarray(len(text), np.int32)
    sizes = np.asarray(multihost_utils.process_allgather(size))
    buffer = np.zeros(int(sizes.max()), np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(buffer))
    return [row[:n].tobytes() for row, n in zip(rows, sizes.tolist(), strict=True)]


def agree(topic: str, facts: Mapping[str, Any]) -> None:
    """Raises unless all processes give the same facts; all of them have to call it.

    Args:
        topic: What they are about, in words.
        facts: Values that JSON can hold, by name.

    Raises:
        DistributedError: On every process, with what differs and where.
    """
    if jax.process_count() == 1:
        return
    mine = json.dumps([socket.gethostname(), dict(facts)], default=str)
    cards = [json.loads(card) for card in _gather_bytes(mine.encode())]
    host, first = cards[0]
    others = [n for n, (_, found) in enumerate(cards) if found != first]
    if not others:
        return
    other_host, other = cards[others[0]]
    lines = [
        f"{name}: {show(first.get(name))} and {show(other.get(name))}"
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"... and {len(lines) - _MOST_LINES} more"]
    raise DistributedError(
        f"the processes disagree in their {topic}: not as process 0 has it in process "
        f"{', '.join(map(str, others))}. Of process 0 ({host}) and process {others[0]} "
        f"({other_host}):\n  " + "\n  ".join(lines) + "\nstart all processes with the "
        "same settings, files and versions"
    )


def agree_on_settings(settings: Settings) -> None:
    """Raises unless all processes have the same settings and versions.

    How each found the others is its own affair: `settings.distributed` may differ.

    Raises:
        DistributedError: On every process, with what differs and where.
    """
    facts = flatten(settings).items()
    facts = {k: v for k, v in facts if not k.startswith("distributed.")}
    facts |= {f"version of {n}": importlib.metadata.version(n) for n in _VERSIONS}
    agree("settings", facts | {"Python": platform.python_version()})


def gather(tree: Any) -> Any:
    """Returns a tree of arrays as numpy arrays on process 0; None as leaves elsewhere.

    One leaf after the other, so that a device holds no more than one of them whole.

    Args:
        tree: Arrays over the devices of all processes; all of them have to call this.
    """
    if jax.process_count() == 1:
        return tree

    def one(leaf: jax.Array) -> np.ndarray | None:
        whole = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return whole if is_main_process() else None

    return jax.tree.map(one, tree)
