"""What would make a step fit, found by compiling it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from taid_jax.models.config import DecoderConfig
from taid_jax.plan.compiled import Plan, Teachers, plan_mesh, plan_step
from taid_jax.plan.machine import Machine
from taid_jax.settings import Settings, SettingsError, from_dict
from taid_jax.types import DATA, FSDP, TENSOR

SHORTEST = 256
"""Tokens: no shorter sequences are tried."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A step with other settings."""

    flags: Mapping[str, str | int]
    plan: Plan


def find_fit(
    settings: Settings,
    teacher: Teachers,
    student: DecoderConfig,
    machine: Machine,
    *,
    compiled: Callable[[Attempt], None] = lambda attempt: None,
) -> list[Attempt]:
    """Returns what was tried to make a step fit; the last one fits, if any does.

    Each attempt keeps the changes of those before it, from what costs nothing to what
    changes the run: weights cut over all devices, the student's layers computed again,
    smaller micro-batches, shorter sequences.
    """
    attempts = []
    for flags in _changes(settings, machine):
        try:
            changed = from_dict(flags, settings)
        except SettingsError:  # Completions, for one, have no room in shorter rows.
            break
        attempts.append(Attempt(flags, plan_step(changed, teacher, student, machine)))
        compiled(attempts[-1])
        if attempts[-1].plan.fits:
            break
    return attempts


def _changes(settings: Settings, machine: Machine) -> Iterator[dict[str, str | int]]:
    """Yields the changes to try, each on top of those before."""
    flags: dict[str, str | int] = {}
    mesh = plan_mesh(settings.run.mesh, machine).shape
    if mesh[DATA] > 1:
        size = mesh[DATA] * mesh[FSDP]
        flags["mesh"] = f"{DATA}=1,{FSDP}={size},{TENSOR}={mesh[TENSOR]}"
        yield dict(flags)
    if settings.model.remat != "full":
        flags["remat"] = "full"
        yield dict(flags)
    # One sequence per device at a time is the least that there is.
    most = settings.data.batch_size // (mesh[DATA] * mesh[FSDP])
    now = settings.optimizer.grad_accum
    for accum in sorted({accum for accum in (4 * now, most) if now < accum <= most}):
        if most % accum == 0:
            flags["grad_accum"] = accum
            yield dict(flags)
    length = settings.data.seq_len // 2
    while length >= SHORTEST:
        flags["seq_len"] = length
        if settings.data.teacher_seq_len is not None:
            own = settings.data.teacher_seq_len * length // settings.data.seq_len
            flags["teacher_seq_len"] = own
        yield dict(flags)
        length //= 2
