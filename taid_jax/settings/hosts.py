"""Settings of a run of several processes."""

import dataclasses
from typing import Literal

from taid_jax.settings.checks import Checked, bounded, need


@dataclasses.dataclass(frozen=True)
class HostSettings(Checked):
    """How several processes, mostly one per host, become one run.

    On TPU pods, under Slurm, Open MPI and in Kubernetes they find each other by JAX's
    own detection. Elsewhere each is started with the same `coordinator` and
    `num_processes`, and a `process_id` of its own.

    Attributes:
        cluster: Who says which processes there are: `auto` takes the first kind of
            cluster that JAX detects, `none` makes this process a run by itself, a name
            insists on one kind.
        coordinator: HOST:PORT of process 0, where the processes meet; the port has to
            be free there.
        num_processes: How many there are.
        process_id: This one's number, from 0.
        join_timeout: Seconds to wait until all processes have come.
        heartbeat_timeout: Seconds without a sign of life after which a process counts
            as lost and the others end.
    """

    cluster: Literal[
        "auto", "none", "slurm", "k8s", "gcetpu", "gketpu", "ompi", "mpi4py"
    ] = "auto"
    coordinator: str | None = None
    num_processes: int | None = bounded(None, ge=1)
    process_id: int | None = bounded(None, ge=0)
    join_timeout: int = bounded(300, ge=1, le=10**6)
    heartbeat_timeout: int = bounded(30, ge=1, le=10**6)

    def __post_init__(self):
        super().__post_init__()
        by_hand = (self.coordinator, self.num_processes, self.process_id)
        need(
            "coordinator, num_processes, process_id",
            by_hand,
            None not in by_hand or by_hand == (None, None, None),
            "all three, or none of them",
        )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            fits = (
                bool(host)
                and port.isascii()
                and port.isdigit()
                and 0 < int(port) < 65536
            )
            need("coordinator", self.coordinator, fits, "HOST:PORT of process 0")
        if self.num_processes is not None and self.process_id is not None:
            inside = self.process_id < self.num_processes
            wanted = f"0 <= process_id < num_processes, which is {self.num_processes}"
            need("process_id", self.process_id, inside, wanted)
