"""Meeting the other processes of a run, or saying which of them did not come."""

import contextlib
import ctypes
import importlib
import importlib.util
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from taid_jax.hosts.errors import HostsError
from taid_jax.hosts.leave import watch
from taid_jax.settings import HostSettings

# JAX's limit for the processes' last meeting; the run has its own, longer one before.
_SHUTDOWN_SECONDS = 60
# How much longer a process waits for process 0, which says who is missing.
_PATIENCE = 10


def join(settings: HostSettings) -> None:
    """Makes this process one of several, if it is; else does nothing.

    To be called before anything touches a device. Afterwards `jax.devices()` are those
    of all processes. If one does not come in time, all that did end with exit status 2
    and a message with the numbers of the missing: JAX leaves no way to go on.

    Args:
        settings: Which processes there are, or who says so.

    Raises:
        HostsError: If the processes cannot be found, or this one cannot take part.
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
        platforms: str | None = getattr(jax.config, "jax_platforms", None)
        if not several_expected(os.environ, platforms):
            return
        which = {}
    else:
        which = {"cluster_detection_method": settings.cluster}
    by_hand = settings.coordinator is not None
    place = f"at {settings.coordinator}" if by_hand else "of this cluster"
    sys.stderr.write(
        f"joining the other processes {place}, for at most {settings.join_timeout} s\n"
    )
    # Between CPUs; other devices have collectives of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        with _missing_named(settings), _register_timeout(settings.join_timeout):
            jax.distributed.initialize(
                **which,
                initialization_timeout=settings.join_timeout + _PATIENCE,
                heartbeat_timeout_seconds=settings.heartbeat_timeout,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise HostsError(
            f"this process cannot join the others: {str(error).strip(' .')}. Give "
            "--coordinator HOST:PORT, --num-processes and --process-id, or --cluster "
            "none for a run of this process alone"
        ) from error
    if jax.process_count() > 1:
        watch()


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

    started_by_slurm = {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys()
    if started_by_slurm and number("SLURM_NTASKS") > 1:
        return True
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return True
    # An indexed job; without an index JAX could not number the processes either.
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return True
    if (platforms or "tpu").split(",")[0] != "tpu":
        return False
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get(
        "TPU_WORKER_HOSTNAMES", ""
    )
    if "," in workers or number("MEGASCALE_NUM_SLICES") > 1:
        return True
    # A TPU virtual machine: its metadata say whether it is one of several. JAX sets
    # this variable when it is imported where there is no TPU.
    has_tpu = "TPU_SKIP_MDS_QUERY" not in environment
    return has_tpu and importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def _register_timeout(seconds: int) -> Iterator[None]:
    """Lets process 0 tell the others who is missing; JAX has no public way to ask.

    Where JAX's inside is another, nothing is changed, and the message has no numbers.
    """
    try:
        inside: Any = importlib.import_module("jax._src.lib")._jax
        start: Callable[..., Any] = inside.get_distributed_runtime_service
    except (ImportError, AttributeError):
        yield
        return

    def service(*args: Any, **options: Any) -> Any:
        return start(*args, cluster_register_timeout=seconds, **options)

    inside.get_distributed_runtime_service = service
    try:
        yield
    finally:
        inside.get_distributed_runtime_service = start


@contextlib.contextmanager
def _missing_named(settings: HostSettings) -> Iterator[None]:
    """Within it, JAX's end of the process becomes a message and exit status 2.

    When not all come, JAX writes a stack trace and aborts; Python is given no
    exception. What is written meanwhile is kept, and shown if all goes well.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        shown = os.dup(2)

        def written() -> bytes:
            kept.seek(0)
            return kept.read()

        def on_abort(_: int) -> None:
            message = f"error: {explain(written().decode(errors='replace'), settings)}"
            os.write(shown, message.encode() + b"\n")
            os._exit(2)

        # The signal comes in the thread that waits in `initialize`, which holds
        # nothing that Python needs.
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
        before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            libc.signal(signal.SIGABRT, before)
            os.dup2(shown, 2)
            os.close(shown)
            sys.stderr.write(written().decode(errors="replace"))


def explain(log: str, settings: HostSettings) -> str:
    """Returns why the processes did not meet, from what JAX wrote.

    Args:
        log: Its error, which lists processes by number where it knows them.
        settings: What was asked for.
    """
    seconds = settings.join_timeout
    where = settings.coordinator or "the coordinator"
    again = "; start all of them at about the same time, or raise --join-timeout"
    count = re.search(r"tasks that reached the barrier: (\d+)/(\d+)", log)
    listed = re.search(r"timed out task names:\s*\n((?:\d+\n)+)", log)
    if count and listed:
        missing = sorted({int(number) for number in listed[1].split()})
        names = ", ".join(str(number) for number in missing)
        return (
            f"{count[1]} of {count[2]} processes joined within {seconds} s at {where}; "
            f"missing: process {names}{again}"
        )
    if "wrong service incarnation" in log or "ALREADY_EXISTS" in log:
        return (
            f"another process at {where} has this one's number already; give each "
            "process its own --process-id, and each run its own port"
        )
    return (
        f"no answer within {seconds + _PATIENCE} s from process 0 at {where}: it did "
        "not start, cannot be reached from this host, or still waits for others, which "
        f"its own message names{again}"
    )
