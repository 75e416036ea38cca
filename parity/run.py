"""Rows of whole training runs: a recorded one, replayed through the real trainer."""

import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from parity.published import REFERENCE, Published
from parity.rows import Row, Tally, Tolerance, triple
from parity.runs import BATCH_KEYS, Run, RunSettings, load_run
from parity.torch_run import finish_run, record_run, rerun, train
from taid_jax.models.decoder import decoder_functions
from taid_jax.models.files.load import load_model
from taid_jax.settings import ObjectiveSettings
from taid_jax.train.objective import make_objective, make_scheduler
from taid_jax.train.state import (
    init_state,
    learning_rate_schedule,
    make_optimizer,
)
from taid_jax.train.step import make_train_step

LOSS = Tolerance(
    1e-5,
    "relative, at every step; two attention paths of PyTorch itself differ by 2e-7; "
    "over tens of steps the roundings of two programs grow further apart",
)
GRAD_NORM = Tolerance(
    2e-4,
    "relative, at every step; a gradient is a sum of thousands of cancelling terms: "
    "two attention paths of PyTorch itself differ by 1e-5, and where a run magnifies "
    "roundings, ours may be as far from float64 as PyTorch is",
)
T = Tolerance(1e-6, "absolute, at every step; a few roundings of a number below 1")
RATE = Tolerance(1e-6, "of the first rate; a cosine in float32 beside one in float64")
WEIGHTS = Tolerance(
    2e-4,
    "of their norm; Adam divides by the root of a second moment, so that an entry with "
    "hardly any gradient moves by its rounding; PyTorch's own two paths differ by 1e-5",
)


class Replayed(NamedTuple):
    """What our trainer made of a recorded run: arrays of `run.npz`, and parameters."""

    steps: dict[str, np.ndarray]
    params: Any


MakeStep = Callable[..., Any]
MakeScheduler = Callable[..., Any]


def replay(
    run: Run,
    make_step: MakeStep = make_train_step,
    make_schedule: MakeScheduler = make_scheduler,
    last: int | None = None,
) -> Replayed:
    """Trains the recorded student on the recorded batches with our trainer.

    It stops after `last` steps; after all when None.
    """
    settings = run.settings
    teacher = load_model(run.folder / "teacher", dtype=jnp.float32)
    student = load_model(run.folder / "student_init", dtype=jnp.float32)
    # What has no effect with the others would be refused.
    adaptive: dict[str, Any] = {}
    if settings.objective == "taid":
        adaptive.update(settings.schedule())
        del adaptive["num_train_steps"]
    chosen = ObjectiveSettings(
        objective=settings.objective, distil_ratio=settings.distil_ratio, **adaptive
    )
    objective, learned = make_objective(chosen, settings.steps)
    scheduler = make_schedule(chosen, settings.steps)
    rate = learning_rate_schedule(settings.lr, settings.steps)
    adamw = settings.adamw
    optimizer = make_optimizer(
        rate,
        b1=adamw.b1,
        b2=adamw.b2,
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
        clip_norm=settings.clip_global_norm,
    )
    step = make_step(
        decoder_functions(student.config),
        decoder_functions(teacher.config),
        make_objective=objective,
        scheduler=scheduler,
        optimizer=optimizer,
        learning_rate=rate,
    )
    state = init_state(
        student.params,
        optimizer=optimizer,
        schedule=scheduler.init(),
        learned=learned,
    )
    history = []
    for index in range(last or settings.steps):
        batch = {
            key: jnp.asarray(run.batches[key][index].astype(np.int32))
            for key in BATCH_KEYS
        }
        state, metrics = step(state, teacher.params, batch)
        history.append({**metrics, "t_after": jnp.copy(state.schedule.t)})
    ours = jax.device_get(history)
    names = {
        "loss": "loss",
        "lm_loss": "lm_loss",
        "t_used": "t",
        "t_after": "t_after",
        "grad_norm": "grad_norm",
        "lr": "learning_rate",
    }
    steps = {
        recorded: np.array([float(metrics[name]) for metrics in ours])
        for recorded, name in names.items()
        if name in ours[0]
    }
    return Replayed(steps, state.params)


def _distance(a: Any, b: Any, scale: Any) -> float:
    """Returns the norm of the difference of two trees over the norm of a third."""
    difference = optax.tree_utils.tree_norm(jax.tree.map(jnp.subtract, a, b))
    return float(difference / optax.tree_utils.tree_norm(scale))


def _exact(run: Run, folder: pathlib.Path, last: int | None) -> Replayed:
    """Returns the run in float64, in PyTorch, so that it shows who is right."""
    steps, student = train(
        run.folder, run.settings, run.batches, last=last, dtype=torch.float64
    )
    finish_run(folder, steps, student)
    final = load_model(folder / "student_final", dtype=jnp.float32)
    return Replayed(steps, final.params)


def compare(name: str, other: str, ours: Replayed, run: Run) -> list[Row]:
    """Returns the rows of one run: ours beside what the folder of `run` says."""
    rows = []
    taken = len(ours.steps["loss"])
    with tempfile.TemporaryDirectory() as temporary:
        exact = _exact(run, pathlib.Path(temporary), taken)

    def add(quantity: str, tolerance: Tolerance, *errors: Any) -> None:
        tally = Tally("run", name, quantity, other, tolerance, drifting=True)
        for step, values in enumerate(zip(*errors, strict=True)):
            tally.add(f"step {step}", *(float(value) for value in values))
        rows.append(tally.row())

    def each_step(key: str, tolerance: Tolerance, scale: np.ndarray | float) -> None:
        sides = (side[key][:taken] for side in (ours.steps, run.steps, exact.steps))
        add(key, tolerance, *triple(lambda a, b: np.abs(a - b) / scale, *sides))

    each_step("loss", LOSS, np.abs(exact.steps["loss"]))
    if "lm_loss" in ours.steps:
        each_step("lm_loss", LOSS, np.abs(exact.steps["lm_loss"]))
    if run.settings.loss == "taid":
        for key in ("t_used", "t_after"):
            each_step(key, T, 1.0)
    each_step("grad_norm", GRAD_NORM, np.abs(exact.steps["grad_norm"]))
    each_step("lr", RATE, run.settings.lr)
    if taken == run.settings.steps:
        folder = run.folder / "student_final"
        theirs = load_model(folder, dtype=jnp.float32).params
        sides = ours.params, theirs, exact.params
        errors = triple(lambda a, b: [_distance(a, b, theirs)], *sides)
        add("final weights", WEIGHTS, *errors)
    return rows


def run_folders(golden: pathlib.Path) -> list[pathlib.Path]:
    """Returns the recorded runs in a folder: itself, or those in it."""
    if (golden / "run.json").is_file():
        return [golden]
    return sorted(path.parent for path in golden.glob("*/run.json"))


def recorded_rows(
    golden: pathlib.Path,
    make_step: MakeStep = make_train_step,
    make_schedule: MakeScheduler = make_scheduler,
    last: int | None = None,
) -> list[Row]:
    """Returns the rows of every recorded run in a folder, or of the one that it is.

    Raises:
        RecordingError: If a recording is not whole.
    """
    rows = []
    for folder in run_folders(golden):
        run = load_run(folder)
        ours = replay(run, make_step, make_schedule, last)
        rows += compare(folder.name, "recording", ours, run)
    return rows


def again_rows(
    golden: pathlib.Path,
    published: Published,
) -> list[Row]:
    """Returns the rows of recorded runs, trained again with another PyTorch side."""
    rows = []
    for folder in run_folders(golden):
        with tempfile.TemporaryDirectory() as temporary:
            target = pathlib.Path(temporary) / folder.name
            rerun(load_run(folder), target, published)
            run = load_run(target)
            rows += compare(folder.name, published.name, replay(run), run)
    return rows


FRESH = (
    RunSettings(loss="taid", steps=30),
    RunSettings(loss="fkl", steps=30, distil_ratio=0.7),
)


def fresh_rows(seeds: Iterable[int]) -> list[Row]:
    """Returns the rows of new runs: random models and batches, PyTorch, then ours."""
    rows = []
    for seed in seeds:
        for settings in FRESH:
            name = f"{settings.loss}, ratio {settings.distil_ratio:g}, seed {seed}"
            with tempfile.TemporaryDirectory() as temporary:
                folder = pathlib.Path(temporary)
                record_run(folder, settings, seed)
                run = load_run(folder)
                rows += compare(name, REFERENCE.name, replay(run), run)
    return rows
