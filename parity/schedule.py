"""Rows of TAID's schedule: t at every step of long histories, and of recordings."""

import json
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.published import REFERENCE, Published
from parity.recordings import case_names, check_arrays, load_arrays
from parity.rows import Row, Tallies, Tally, Tolerance
from parity.torch_reference import ScheduleSettings
from taid_jax.schedule import TAIDScheduler

STEPS = 10_000
T = Tolerance(
    1e-6,
    "absolute; t < 1 is held to 2^-25 and shrinks its own error by 1 - delta a step: "
    "a few tens of roundings, 3e-8 each, are alive at a time",
)
MOMENTUM = Tolerance(
    1e-5,
    "relative to the largest; a running mean of numbers held to 6e-8, of which "
    "1 / (1 - beta) = 100 are alive at a time",
)
DRIFT = Tolerance(
    3e-5,
    "absolute; float32 beside float64: 10,000 roundings of t, 3e-8 each, make 3e-4 if "
    "all have one sign and 3e-6 if at random; a tenth of the former",
)


class History(NamedTuple):
    """Losses of a run, and what t did."""

    t: np.ndarray
    momentum: np.ndarray


MakeScheduler = Callable[..., TAIDScheduler]


def histories(seed: int, steps: int) -> dict[str, tuple[ScheduleSettings, np.ndarray]]:
    """Returns losses of runs of every kind, float32, with settings for each."""
    rng = np.random.default_rng(seed)
    at = np.linspace(0.0, 1.0, steps)
    smooth = 1.0 + 8.0 * np.exp(-4.0 * at)
    noise = rng.standard_normal(steps)
    spikes = np.where(rng.random(steps) < 0.01, 10.0 ** rng.uniform(0, 3, steps), 1.0)
    losses: dict[str, tuple[ScheduleSettings, np.ndarray]] = {
        "smooth": ({"num_train_steps": steps}, smooth),
        "noisy": (
            {"num_train_steps": steps, "t_start": 0.2},
            smooth * np.exp(0.1 * noise),
        ),
        "spiky": (
            {"num_train_steps": steps, "alpha": 5e-3, "beta": 0.9},
            smooth * spikes,
        ),
        "constant": (
            {"num_train_steps": steps, "t_start": 0.0, "t_end": 0.8},
            np.full(steps, 2.5),
        ),
        "rising": (
            {"num_train_steps": steps, "alpha": 0.05, "beta": 0.5},
            2.0 + 6.0 * at + 0.01 * noise,
        ),
    }
    return {
        name: (settings, values.astype(np.float32))
        for name, (settings, values) in losses.items()
    }


def published_history(
    settings: ScheduleSettings,
    losses: np.ndarray,
    published: Published = REFERENCE,
) -> History:
    """Returns the PyTorch side's history, one update per step."""
    schedule = published.schedule(**settings)
    t, momentum = np.empty((2, len(losses)))
    for step, value in enumerate(torch.tensor(losses)):
        schedule.update(value, step)
        t[step], momentum[step] = float(schedule.t), float(schedule.momentum)
    return History(t, momentum)


def exact_history(settings: ScheduleSettings, losses: np.ndarray) -> History:
    """Returns the history in float64; a loss that is not finite changes nothing."""
    steps = settings["num_train_steps"]
    start, end = settings.get("t_start", 0.4), settings.get("t_end", 1.0)
    alpha, beta = settings.get("alpha", 5e-4), settings.get("beta", 0.99)
    t, momentum = np.empty((2, len(losses)))
    now, mean, last = float(start), 0.0, None
    for step, value in enumerate(losses.astype(np.float64)):
        if not math.isfinite(value):
            t[step], momentum[step] = now, mean
            continue
        if last is not None:
            mean = beta * mean + (1 - beta) * (last - value) / (last + 1e-15)
            now += alpha / (1 + math.exp(-mean)) * (1 - now)
            linear = start + (end - start) * step / steps
            adaptive = not settings.get("disable_adaptive", False)
            now = min(end, max(linear, now)) if adaptive else linear
        last = float(value)
        t[step], momentum[step] = now, mean
    return History(t, momentum)


def jitted_history(
    settings: ScheduleSettings, losses: np.ndarray, make: MakeScheduler = TAIDScheduler
) -> History:
    """Returns our history, one jitted call per step."""
    scheduler = make(**settings)
    update = jax.jit(scheduler.update)
    state, states = scheduler.init(), []
    for step, value in enumerate(losses):
        state = update(state, value, np.int32(step))
        states.append((state.t, state.momentum))
    t, momentum = np.asarray(jax.device_get(states), np.float64).T
    return History(t, momentum)


def scanned_history(
    settings: ScheduleSettings, losses: np.ndarray, make: MakeScheduler = TAIDScheduler
) -> History:
    """Returns our history, the whole of it in one `lax.scan`."""
    scheduler = make(**settings)

    def advance(state, step_and_loss):
        step, value = step_and_loss
        state = scheduler.update(state, value, step)
        return state, (state.t, state.momentum)

    @jax.jit
    def run(losses):
        steps = jnp.arange(losses.shape[0], dtype=jnp.int32)
        return jax.lax.scan(advance, scheduler.init(), (steps, losses))[1]

    t, momentum = run(jnp.asarray(losses))
    return History(np.asarray(t, np.float64), np.asarray(momentum, np.float64))


def _largest(a: np.ndarray, b: np.ndarray, scale: float = 1.0) -> float:
    return float(np.max(np.abs(a - b))) / scale


def random_rows(
    seeds: Iterable[int],
    steps: int = STEPS,
    published: Published = REFERENCE,
    make: MakeScheduler = TAIDScheduler,
) -> list[Row]:
    """Returns the rows of made-up histories, with and without adaptation."""
    tallies = Tallies("schedule")
    for seed in seeds:
        for name, (base, losses) in histories(seed, steps).items():
            for linear in (False, True):
                settings: ScheduleSettings = {**base, "disable_adaptive": linear}
                theirs = published_history(settings, losses, published)
                exact = exact_history(settings, losses)
                scale = max(float(np.abs(exact.momentum).max()), 1e-9)
                row = name + (", not adaptive" if linear else "")
                for how, side in (("jit", jitted_history), ("scan", scanned_history)):
                    ours = side(settings, losses, make)
                    case = f"{how}, seed {seed}"
                    apart = _largest(ours.t, theirs.t)
                    tallies.add((row, "t", published.name), T, case, apart)
                    drift = _largest(ours.t, exact.t), _largest(theirs.t, exact.t)
                    tallies.add((row, "t", "float64"), DRIFT, case, None, *drift)
                    if not linear:
                        apart = _largest(ours.momentum, theirs.momentum, scale)
                        key = (row, "momentum", published.name)
                        tallies.add(key, MOMENTUM, case, apart)
    return tallies.rows()


def recorded_rows(
    folder: pathlib.Path, make: MakeScheduler = TAIDScheduler
) -> list[Row]:
    """Returns the rows of a folder's `schedule.npz`: ours, and the reference.

    Raises:
        RecordingError: If arrays are missing or misshapen.
    """
    path = folder / "schedule.npz"
    arrays = load_arrays(path)
    rows = []
    for name in case_names(path, arrays):
        steps = arrays.get(f"{name}/losses", np.empty(0)).shape
        needed = ("losses", "t", "momentum", "prev_loss", "delta_t")
        shapes: dict[str, tuple[int, ...]] = {f"{name}/{key}": steps for key in needed}
        check_arrays(path, arrays, {**shapes, f"{name}/config": ()})
        settings = json.loads(str(arrays[f"{name}/config"]))
        losses, t = arrays[f"{name}/losses"], arrays[f"{name}/t"].astype(np.float64)
        again = published_history(settings, losses)
        ours = Tally("schedule", name, "t, jit and scan", "recording", T)
        for how, side in (("jit", jitted_history), ("scan", scanned_history)):
            ours.add(how, _largest(side(settings, losses, make).t, t))
        reference = Tally(
            "schedule", f"{name}, the reference", "t", "recording", Tolerance(0.0, "")
        )
        reference.add("", _largest(again.t, t))
        rows += [ours.row(), reference.row()]
    return rows
