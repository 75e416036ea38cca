"""What the compiler says of a train step: memory, collectives, time at best."""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params, param_axes
from taid_jax.plan.collectives import Collectives, count_collectives
from taid_jax.plan.flops import count_flops_of_parts
from taid_jax.plan.machine import Machine, PlanError
from taid_jax.plan.program import Part
from taid_jax.plan.roofline import Resource, Work, least_seconds
from taid_jax.plan.traffic import count_traffic
from taid_jax.settings import Settings
from taid_jax.sharding import (
    MESH_AXES,
    TEACHER_RULES,
    batch_sharding,
    check_batch,
    make_mesh,
    tree_shardings,
)
from taid_jax.store.format import read_manifest
from taid_jax.store.teacher import head_params
from taid_jax.train.build import build_step, placed
from taid_jax.train.state import DistillState
from taid_jax.train.teachers import (
    WEIGHTS,
    join_columns,
    join_params,
    teacher_functions,
)
from taid_jax.types import Params

_CACHE = "jax_enable_compilation_cache"
_REMATERIALIZED = re.compile("involuntary full rematerialization", re.IGNORECASE)
# "Used 23.4G of 15.7G hbm", or "required for HLO temporaries (320.00G) exceeds".
_NEEDED = re.compile(r"(?:Used |required for [\w ]*\()([\d.]+)([KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of one step. Bytes are those of one device.

    Attributes:
        machine: Name of the machine.
        mesh: Sizes of the mesh axes.
        chips: Devices of the machine.
        hbm_limit_bytes: Memory that a program can have.
        argument_bytes: State, teacher and batch.
        temp_bytes: Needed beside them while the step runs; None when the compiler gave
            up for lack of memory.
        peak_bytes: Arguments, results that do not take an argument's place, temporaries
            and code; what the compiler said it needed when it gave up.
        fits: Whether the compiler found room for all of it.
        flops_per_chip: Of a step's matrix products, shared out evenly.
        collectives: What is exchanged; None when the compiler gave up.
        rematerializations: Warnings of the partitioner that it had to gather an array
            whole to change its layout.
        compile_seconds: Tracing and compiling.
        seconds: The least time of a step by each resource in use; empty for unknown
            chips, and when the compiler gave up.
        parts: What each part of the step does; empty when the compiler gave up.
    """

    machine: str
    mesh: dict[str, int]
    chips: int
    hbm_limit_bytes: int
    argument_bytes: int
    temp_bytes: int | None
    peak_bytes: int | None
    fits: bool
    flops_per_chip: int
    collectives: Collectives | None
    rematerializations: int
    compile_seconds: float
    seconds: dict[Resource, float]
    parts: dict[Part, Work]

    @property
    def binds(self) -> Resource | None:
        """The resource that a step has to wait for longest; None for unknown chips."""
        return max(self.seconds, key=self.seconds.__getitem__, default=None)

    @property
    def step_seconds_lower_bound(self) -> float | None:
        """No step is faster than this; None for unknown chips."""
        return max(self.seconds.values(), default=None)


Teachers = DecoderConfig | Sequence[DecoderConfig]
"""The architecture of the teacher, or those of several."""


def plan_step(
    settings: Settings, teacher: Teachers, student: DecoderConfig, machine: Machine
) -> Plan:
    """Returns the plan of a run's train step, by compiling it; no array is made.

    Args:
        settings: Of the run; mesh, batch, dtype, remat and objective among them.
        teacher: Its architecture; weights in the compute dtype, as a run loads them. A
            list of those of several.
        student: Its architecture; float32 master weights.
        machine: What to compile for.

    Raises:
        ShardingError: If mesh or batch do not suit the machine.
        PlanError: If the compiler refuses for another reason than memory.
    """
    mesh = plan_mesh(settings.run.mesh, machine)
    check_batch(settings.data.batch_size // settings.optimizer.grad_accum, mesh)
    step, arguments = abstract_step(settings, teacher, student, mesh)
    began = time.perf_counter()
    compiled, failure = None, ""
    precision = jax.default_matmul_precision(settings.model.matmul_precision)
    with standard_error() as said, compiled_anew(), precision:
        traced = step.trace(*arguments)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            failure = str(error)
        log = said()
    seconds = time.perf_counter() - began
    if failure and "RESOURCE_EXHAUSTED" not in failure:
        raise PlanError(f"plan: the compiler refused the step: {failure}")
    # Without the padding that the compiler adds; replaced below by its own count.
    argument_bytes = sum(_device_bytes(leaf) for leaf in jax.tree.leaves(arguments))
    temp_bytes = collectives = None
    flops = count_flops_of_parts(traced.jaxpr)
    parts: dict[Part, Work] = {}
    peak_bytes = _needed(failure)
    if compiled is not None:
        memory = compiled.memory_analysis()
        argument_bytes = memory.argument_size_in_bytes
        temp_bytes = memory.temp_size_in_bytes
        peak_bytes = argument_bytes + temp_bytes + memory.generated_code_size_in_bytes
        peak_bytes += memory.output_size_in_bytes - memory.alias_size_in_bytes
        text = compiled.as_text()
        collectives = count_collectives(text, machine.linked)
        traffic = count_traffic(text)
        parts = {
            part: Work(
                flops[part] / len(machine.devices),
                traffic.get(part, 0),
                *collectives.parts.get(part, (0.0, 0.0)),
            )
            for part in get_args(Part)
        }
    return Plan(
        machine=machine.name,
        mesh={axis: int(size) for axis, size in mesh.shape.items()},
        chips=len(machine.devices),
        hbm_limit_bytes=machine.hbm_bytes,
        argument_bytes=argument_bytes,
        temp_bytes=temp_bytes,
        peak_bytes=peak_bytes,
        fits=compiled is not None and (peak_bytes or 0) <= machine.hbm_bytes,
        flops_per_chip=flops.total() // len(machine.devices),
        collectives=collectives,
        rematerializations=len(_REMATERIALIZED.findall(log)),
        compile_seconds=round(seconds, 2),
        seconds=least_seconds(machine.chip, parts.values()) if parts else {},
        parts=parts,
    )


def abstract_step(
    settings: Settings, teacher: Teachers, student: DecoderConfig, mesh: Mesh
) -> tuple[Any, tuple[DistillState, Params, dict[str, jax.ShapeDtypeStruct]]]:
    """Returns a run's jitted train step and the shapes and places of its arguments.

    The teacher's weights have the compute dtype, the student's are float32.
    """
    model, data = settings.model, settings.data
    dtype = jnp.dtype(model.dtype)
    teachers = [teacher] if isinstance(teacher, DecoderConfig) else list(teacher)
    stores = []
    if model.teacher_store is not None:
        stores = [read_manifest(pathlib.Path(each)) for each in model.teachers]
    functions = teacher_functions(
        model, teachers, stores, own_rows=data.teacher_len is not None
    )

    def weights(config: DecoderConfig, kind: str | None) -> Params:
        shapes = abstract_params(config, dtype)
        rules = TEACHER_RULES[model.teacher_sharding]
        places = tree_shardings(param_axes(config), shapes, mesh, rules)
        if kind is not None:
            shapes, places = (
                head_params(tree, config) if kind == "hidden" else {}
                for tree in (shapes, places)
            )
        return placed(shapes, places)

    kinds = [store.kind for store in stores] or [None] * len(teachers)
    pairs = zip(teachers, kinds, strict=True)
    # An average is in the state.
    averaged = model.teacher_ema is not None
    teacher_params = {} if averaged else join_params([weights(*pair) for pair in pairs])
    built = build_step(settings, student, functions, mesh)
    beside = ("segment_ids", "positions") if data.pack else ("attention_mask",)

    def array(
        dtype: Any, *width: int, length: int = data.seq_len
    ) -> jax.ShapeDtypeStruct:
        shape, where = (data.batch_size, length, *width), batch_sharding(mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    columns = [
        {column.name: array(column.dtype, column.width) for column in store.columns}
        for store in stores
    ]
    batch = {key: array(jnp.int32) for key in ("input_ids", "labels", *beside)}
    batch |= join_columns(columns) if columns else {}
    if settings.on_policy.texts == "pairs":
        batch["from_student"] = array(jnp.int32)
    if data.teacher_len is not None:
        batch["teacher_index"] = array(jnp.int32)
        batch |= {
            f"teacher_{key}": array(jnp.int32, length=data.teacher_len)
            for key in ("input_ids", *beside)
        }
    if model.teacher_field is not None:
        batch[WEIGHTS] = array(jnp.float32, len(teachers))
    return built.step, (built.state, teacher_params, batch)


def plan_mesh(text: str, machine: Machine) -> Mesh:
    """Returns the mesh that a run on the machine would have.

    Raises:
        ShardingError: If the sizes do not multiply to the number of devices.
    """
    mesh = make_mesh(text, machine.devices)
    # As a run on the machine does: neighbours on the mesh are to be near each other.
    return jax.make_mesh(
        tuple(mesh.shape.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=machine.devices,
    )


def _device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def _needed(failure: str) -> int | None:
    """Returns the bytes that the compiler said it would need, if it did."""
    found = _NEEDED.search(failure)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Keeps JAX from its compile cache on disk.

    Programs for machines that are not there cannot be read back from it, and for those
    that are, the partitioner would have nothing to say.
    """
    enabled = getattr(jax.config, _CACHE)
    jax.config.update(_CACHE, False)
    compilation_cache.reset_cache()  # JAX looks at the setting only once.
    try:
        yield
    finally:
        jax.config.update(_CACHE, enabled)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def standard_error() -> Iterator[Callable[[], str]]:
    """Catches what the process writes to standard error, C++ included.

    Yields:
        A function that returns what was written so far.
    """
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:

        def said() -> str:
            sys.stderr.flush()
            file.seek(0)
            return file.read().decode(errors="replace")

        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
