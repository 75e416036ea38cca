"""Makes a folder of recordings from the PyTorch reference, with any seed.

    python -m parity.record FOLDER --seed 1

The folder has the format of `parity/golden` and can be given to `--golden`.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from parity import schedule as schedules
from parity.cases import Case, Grid, random_cases
from parity.outcomes import TORCH_DTYPES, rounded, torch_outcome
from parity.published import temperature_gradient
from parity.recordings import save_arrays
from parity.runs import RunSettings
from parity.subjects import CTKD_EPOCH, SUBJECTS
from parity.torch_reference import PublishedSchedule, published_loss
from parity.torch_run import record_run


def record_losses(folder: pathlib.Path, seed: int) -> None:
    """Writes `losses.npz`: every objective on random logits, value and gradient."""
    arrays: dict[str, np.ndarray] = {}
    names = []
    grid = Grid(scales=(0.1, 3.0, 12.0), vocabs=(17, 129), dtypes=("float32",))
    cases = [case for case in random_cases(grid, seed) if not (case.near or case.empty)]
    for index, case in enumerate(cases):
        dtypes = ("float32", "bfloat16") if index == 1 else ("float32",)
        for dtype in dtypes:
            name = f"{index}_{dtype}"
            names.append(name)
            arrays |= _loss_arrays(name, rounded(case, dtype), dtype)
    save_arrays(folder / "losses.npz", {"cases": np.array(names), **arrays})


def _loss_arrays(name: str, case: Case, dtype: str) -> dict[str, np.ndarray]:
    first = np.full((*case.labels.shape[:-1], 1), -100, case.labels.dtype)
    arrays = {
        "student": case.student,
        "teacher": case.teacher,
        "mask": case.mask,
        "labels": np.concatenate([first, case.labels], axis=-1).astype(np.int64),
        "dtype": np.array(dtype),
        "ctkd/grad_temperature": _temperature_gradient(case, dtype),
    }
    for subject in SUBJECTS:
        if subject.recorded:
            outcome = torch_outcome(subject, published_loss, case, dtype, total=False)
            arrays[f"{subject.recorded}/loss"] = np.float32(outcome.value)
            arrays[f"{subject.recorded}/grad"] = outcome.gradient.astype(np.float32)
    return {f"{name}/{key}": np.asarray(value) for key, value in arrays.items()}


def _temperature_gradient(case: Case, dtype: str) -> np.float32:
    student, teacher = (
        torch.tensor(side).to(TORCH_DTYPES[dtype])
        for side in (case.student, case.teacher)
    )
    mask = torch.tensor(case.mask)
    return np.float32(temperature_gradient(student, teacher, mask, CTKD_EPOCH))


def record_schedule(folder: pathlib.Path, seed: int, steps: int = 1000) -> None:
    """Writes `schedule.npz`: histories of losses, and what the controller did."""
    arrays: dict[str, np.ndarray] = {}
    histories = schedules.histories(seed, steps)
    histories["linear"] = (
        {"num_train_steps": steps, "disable_adaptive": True},
        histories["noisy"][1],
    )
    for name, (settings, losses) in histories.items():
        controller = PublishedSchedule(**settings)
        after: dict[str, list[float]] = {}
        for step, loss in enumerate(torch.tensor(losses)):
            controller.update(loss, step)
            for key, attribute in (
                ("t", "t"),
                ("momentum", "momentum"),
                ("prev_loss", "prev_loss"),
                ("delta_t", "delta"),
            ):
                after.setdefault(key, []).append(float(getattr(controller, attribute)))
        arrays[f"{name}/config"] = np.array(json.dumps(settings))
        arrays[f"{name}/losses"] = losses
        for key, values in after.items():
            arrays[f"{name}/{key}"] = np.array(values, np.float32)
    arrays["cases"] = np.array(list(histories))
    save_arrays(folder / "schedule.npz", arrays)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and records."""
    parser = argparse.ArgumentParser("python -m parity.record", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    disable_progress_bar()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    record_losses(chosen.folder, chosen.seed)
    record_schedule(chosen.folder, chosen.seed)
    for loss in ("taid", "sft"):
        settings = dataclasses.replace(RunSettings(), loss=loss, steps=chosen.steps)
        record_run(chosen.folder / f"run_{loss}", settings, chosen.seed)


if __name__ == "__main__":
    main()
