"""A plan of the run that the settings describe: printed, and written to plan.json."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from taid_jax.chips import Chip
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import select_layers
from taid_jax.models.files.hub import DEFAULT_TEACHER
from taid_jax.models.files.load import load_config
from taid_jax.models.presets import PRESETS
from taid_jax.plan.advice import Attempt, find_fit
from taid_jax.plan.compiled import Plan, Teachers, plan_mesh, plan_step
from taid_jax.plan.machine import PlanError, find_machine
from taid_jax.plan.roofline import least_seconds
from taid_jax.settings import Settings, to_dict
from taid_jax.sharding import check_batch
from taid_jax.store.format import TEACHER
from taid_jax.train.inputs import named_teachers

PLAN = "plan.json"
FORMAT = "taid-jax plan 1"
"""First entry of the file: nothing without it is ever replaced."""

# More than the rounding up of a vocabulary, which is to a multiple of 512 at most.
_OTHER_VOCABULARY = 1024
_ALIASES = {DEFAULT_TEACHER: "smollm2-135m"}


def make_plan(settings: Settings, machine_name: str, console: Console) -> Plan:
    """Plans the run of the settings, shows the plan and writes it.

    Args:
        settings: Of the run. `teacher`, `student` and `student_config` are presets,
            config.json files, model folders or GGUF files; no weight is read.
        machine_name: Such as `v5e:8x8`, `h100:8x8` or `local:8`.
        console: Where the table goes.

    Returns:
        The plan of the run as it was asked for, whether it fits or not.

    Raises:
        PlanError: If the machine is unknown, a model cannot be found here, or
            something else lies where the plan is to be written.
        ModelError: If a model cannot be used.
        ShardingError: If mesh or batch do not suit the machine.
    """
    teacher, student, notes = pair_configs(settings)
    machine = find_machine(machine_name)
    notes += machine.notes
    rows = settings.data.batch_size // settings.optimizer.grad_accum
    check_batch(rows, plan_mesh(settings.run.mesh, machine))
    path = _prepare(pathlib.Path(settings.run.output))
    plan = plan_step(settings, teacher, student, machine)
    console.print(plan_table(plan))
    if plan.parts:
        console.print(parts_table(plan, machine.chip))
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
    attempts: list[Attempt] = []
    if not plan.fits:
        console.print("It does not fit. Trying what would:")

        def show(attempt: Attempt) -> None:
            verdict = "fits" if attempt.plan.fits else "does not fit"
            text = (
                f"{as_flags(attempt.flags)}: {gib(attempt.plan.peak_bytes)}, {verdict}"
            )
            console.print(text, soft_wrap=True, markup=False, highlight=False)

        attempts = find_fit(settings, teacher, student, machine, compiled=show)
        if not any(attempt.plan.fits for attempt in attempts):
            console.print(
                "None of it is enough: it needs more devices, or larger ones."
            )
    values = plan_values(plan, settings, notes, attempts)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {path}", soft_wrap=True, highlight=False, markup=False)
    return plan


def pair_configs(settings: Settings) -> tuple[Teachers, DecoderConfig, list[str]]:
    """Returns teacher, student, and what about them is not as in the real models.

    Of several teachers it is a list.

    Raises:
        PlanError: If a model is not here, or the two cannot be a pair.
        ModelError: If the decoder cannot be it.
    """
    model, notes = settings.model, []

    def find(flag: str, source: str) -> DecoderConfig:
        name = _ALIASES.get(source, source)
        if name in PRESETS:
            return PRESETS[name]
        if pathlib.Path(source).expanduser().exists():
            return load_config(source, allow_unknown_keys=model.allow_unknown_keys)
        raise PlanError(
            f"{flag}: there is no file or folder {source!r}, and nothing is downloaded "
            f"for a plan. Presets are: {', '.join(PRESETS)}"
        )

    if model.teaches_itself and model.student is not None:
        teachers = [find("student", model.student)]
    elif model.teacher_store is None:
        teachers = [find("teacher", each) for each in model.teachers]
    else:
        folders = [str(pathlib.Path(each, TEACHER)) for each in model.teachers]
        teachers = [find("teacher_store", each) for each in folders]
    teacher = teachers[0]
    if model.student is not None:
        student = find("student", model.student)
    elif model.student_config is not None:
        student = find("student_config", model.student_config)
    else:
        student = teacher
    layers = model.student_layers
    if model.student is None and model.student_config is None:
        layers = model.layers_of_teacher
    if layers is not None and model.student_config is None:
        if layers > student.num_layers:
            whose = "teacher" if model.student is None else "student"
            raise PlanError(
                f"student_layers: the {whose} has {student.num_layers} layers, "
                f"got {layers}"
            )
        # Layers may differ: only the choice of them says what the student's are.
        _, student = select_layers({"layers": {}}, student, layers)
    named, data = {**named_teachers(teachers), "student": student}, settings.data
    for flag, config in named.items():
        name, length = "seq_len", data.seq_len
        if flag != "student" and data.teacher_len is not None:
            name, length = "teacher_seq_len", data.teacher_len
        if length > config.max_position_embeddings:
            raise PlanError(
                f"{name}: {length} is beyond the {flag}'s context of "
                f"{config.max_position_embeddings} tokens"
            )
    if model.resize_embeddings:
        # To the tokenizer's size, which is the teacher's but for a little padding.
        own = {k: getattr(teacher, k) for k in ("vocab_size", "padded_vocab_size")}
        *teachers, student = (
            dataclasses.replace(config, **own) for config in (*teachers, student)
        )
        notes.append(f"both vocabularies are planned with {teacher.vocab_size} entries")
    sizes = [config.padded_vocab_size for config in (*teachers, student)]
    for (name, config), size in zip(named.items(), sizes, strict=True):
        if abs(size - sizes[-1]) > _OTHER_VOCABULARY:
            raise PlanError(
                f"the {name} has {config.padded_vocab_size} vocabulary entries, the "
                f"student {sizes[-1]}: a student needs its teacher's tokenizer, or "
                "--resize-embeddings"
            )
    if len({*sizes}) > 1:
        shared = min(sizes)
        notes.append(
            f"vocabularies of {' and '.join(map(str, sizes))} entries differ by "
            f"padding; at most {shared} of either take part"
        )
        *teachers, student = (
            dataclasses.replace(config, vocab_size=shared)
            for config in (*teachers, student)
        )
    if len(teachers) > 1:
        notes.append(f"{len(teachers)} teachers run on every token")
    return (teachers if len(teachers) > 1 else teachers[0]), student, notes


def _prepare(folder: pathlib.Path) -> pathlib.Path:
    """Returns where the plan goes; only an earlier plan may lie there."""
    path = folder / PLAN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if not (isinstance(earlier, dict) and earlier.get("format") == FORMAT):
                raise ValueError
    except OSError as error:
        raise PlanError(f"output: cannot write to {folder}: {error}") from error
    except ValueError:
        raise PlanError(
            f"output: {path} is something else than a plan; it is left alone, choose "
            "another --output"
        ) from None
    return path


def plan_values(
    plan: Plan, settings: Settings, notes: Sequence[str], attempts: Sequence[Attempt]
) -> dict[str, Any]:
    """Returns the content of plan.json."""
    found = next((one for one in attempts if one.plan.fits), None)
    return {
        "format": FORMAT,
        **_numbers(plan),
        "notes": list(notes),
        "would_fit": None if found is None else dict(found.flags),
        "tried": [{"flags": dict(one.flags), **_numbers(one.plan)} for one in attempts],
        "settings": to_dict(settings),
    }


def _numbers(plan: Plan) -> dict[str, Any]:
    collectives = None
    if plan.collectives is not None:
        collectives = {
            kind: {"count": count, "bytes": plan.collectives.bytes[kind]}
            for kind, count in sorted(plan.collectives.count.items())
        }
    values = dataclasses.asdict(plan) | {
        "collectives": collectives,
        "step_seconds_lower_bound": plan.step_seconds_lower_bound,
        "binds": plan.binds,
    }
    if plan.collectives is not None:
        values["collective_bytes"] = plan.collectives.total_bytes
        values["loops_counted_once"] = plan.collectives.endless
    return values


def gib(size: int | None) -> str:
    """Returns a number of bytes for people."""
    if size is None:
        return "unknown"
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def as_flags(flags: Mapping[str, str | int]) -> str:
    """Returns settings as they are written on a command line."""
    return " ".join(f"--{name.replace('_', '-')} {flags[name]}" for name in flags)


def plan_table(plan: Plan) -> Table:
    """Returns the plan as a table."""
    axes = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    table = Table(title=f"{plan.machine}: {plan.chips} devices ({axes})")
    table.add_column("of one device, per step")
    table.add_column("", justify="right")
    verdict = "fits" if plan.fits else "does not fit"
    for row in (
        ("memory that a program can have", gib(plan.hbm_limit_bytes)),
        ("state, teacher and batch", gib(plan.argument_bytes)),
        ("temporaries", gib(plan.temp_bytes)),
        ("peak", f"{gib(plan.peak_bytes)}: {verdict}"),
        ("matrix products", f"{plan.flops_per_chip / 1e12:,.3f} TFLOP"),
    ):
        table.add_row(*row)
    if plan.collectives is not None:
        for kind, count in sorted(plan.collectives.count.items()):
            size = gib(plan.collectives.bytes[kind])
            table.add_row(kind, f"{count:,} x, {size}")
    names = {"flops": "products", "hbm": "memory", "interconnect": "links"}
    names["network"] = "network between hosts"
    for resource, seconds in plan.seconds.items():
        binds = " (binds)" if resource == plan.binds else ""
        table.add_row(f"at least, {names[resource]}", f"{seconds * 1e3:,.1f} ms{binds}")
    table.add_row("layouts that forced a whole copy", str(plan.rematerializations))
    table.add_row("compiled in", f"{plan.compile_seconds:.1f} s")
    return table


def parts_table(plan: Plan, chip: Chip | None) -> Table:
    """Returns what the parts of the step do at least, as a table."""
    table = Table(title="at least; what is found in a cache is not read from memory")
    for name in ("of one device", "products", "memory", "links", "network", "ms"):
        table.add_column(name, justify="right" if table.columns else "left")
    for part, work in plan.parts.items():
        seconds = max(least_seconds(chip, [work]).values(), default=None)
        table.add_row(
            part,
            f"{work.flops / 1e12:,.3f} TFLOP",
            *(gib(int(size)) for size in (work.bytes, work.sent, work.sent_network)),
            "unknown" if seconds is None else f"{seconds * 1e3:,.1f}",
        )
    return table
