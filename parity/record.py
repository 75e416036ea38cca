"""Makes a folder of recordings from the PyTorch reference, with any seed.

    python -m parity.record FOLDER --seed 1

The folder has the format of `parity/golden` and can be given to `--golden`.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from parity import schedule as schedules
from parity.cases import Case, Grid, random_cases
from parity.outcomes import TORCH_DTYPES, torch_outcome
from parity.runs import BATCH_KEYS, STEP_KEYS, Run, RunSettings, save_settings
from parity.subjects import CTKD_EPOCH, SUBJECTS, TorchLoss
from parity.torch_reference import (
    PublishedSchedule,
    Settings,
    ctkd_strength,
    ctkd_temperature,
    published_loss,
)

_VOCAB = 256


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
            arrays |= _loss_arrays(name, _rounded(case, dtype), dtype)
    np.savez_compressed(folder / "losses.npz", cases=np.array(names), **arrays)


def _rounded(case: Case, dtype: str) -> Case:
    student, teacher = (
        torch.tensor(logits).to(TORCH_DTYPES[dtype]).float().numpy()
        for logits in (case.student, case.teacher)
    )
    return case._replace(student=student, teacher=teacher)


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
    raw = torch.ones((), requires_grad=True)
    student, teacher = (
        torch.tensor(logits).to(TORCH_DTYPES[dtype])
        for logits in (case.student, case.teacher)
    )
    loss = published_loss(
        "ctkd",
        student,
        teacher,
        torch.tensor(case.mask),
        torch.tensor(case.labels).long(),
        Settings(temperature=ctkd_temperature(raw)),
    )
    (gradient,) = torch.autograd.grad(loss, raw)
    return np.float32(ctkd_strength(CTKD_EPOCH) * float(gradient))


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
    np.savez_compressed(
        folder / "schedule.npz", cases=np.array(list(histories)), **arrays
    )


def new_run(folder: pathlib.Path, settings: RunSettings, seed: int) -> None:
    """Writes what a run starts from: two random Llamas, batches and settings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    save_settings(folder / "run.json", settings)
    torch.manual_seed(seed)
    shared = {"vocab_size": _VOCAB, "max_position_embeddings": 128, "head_dim": 16}
    teacher = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
        tie_word_embeddings=False,
        **shared,
    )
    student = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        initializer_range=0.05,
        tie_word_embeddings=True,
        **shared,
    )
    for name, config in (("teacher", teacher), ("student_init", student)):
        LlamaForCausalLM(config).save_pretrained(folder / name)
    batches = _random_batches(settings, np.random.default_rng(seed))
    np.savez_compressed(folder / "batches.npz", **batches)


def _random_batches(
    settings: RunSettings, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Returns sequences of a few repeated phrases, padded, with uncounted prompts."""
    shape = (settings.steps, settings.batch, settings.length)
    phrases = rng.integers(3, _VOCAB, (40, 4))
    drawn = rng.integers(0, len(phrases), (*shape[:2], -(-shape[2] // 4)))
    tokens = phrases[drawn].reshape(*shape[:2], -1)[..., : shape[2]]
    length = rng.integers(shape[2] // 2, shape[2] + 1, shape[:2])[..., None]
    prompt = rng.integers(1, shape[2] // 4, shape[:2])[..., None]
    position = np.arange(shape[2])
    real = position < length
    counted = real & (position >= prompt)
    return {
        "input_ids": np.where(real, tokens, 0).astype(np.int64),
        "attention_mask": real.astype(np.int64),
        "labels": np.where(counted, tokens, -100).astype(np.int64),
    }


def train(
    folder: pathlib.Path,
    settings: RunSettings,
    batches: dict[str, np.ndarray],
    loss: TorchLoss = published_loss,
    make_schedule: schedules.MakeSchedule = PublishedSchedule,
    last: int | None = None,
) -> tuple[dict[str, np.ndarray], torch.nn.Module]:
    """Trains a student in PyTorch as the published recipe does, on a CPU in float32.

    Args:
        folder: With `teacher` and `student_init` in it.
        settings: Of the run.
        batches: `input_ids`, `attention_mask`, `labels`.
        loss: Mean loss of a batch.
        make_schedule: TAID's controller.
        last: Stop after this many steps; all when None.

    Returns:
        The arrays of `run.npz`, and the student after the last step.
    """
    from transformers import LlamaForCausalLM

    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher").eval()
    student = LlamaForCausalLM.from_pretrained(folder / "student_init").train()
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=settings.lr,
        betas=(settings.adamw.b1, settings.adamw.b2),
        eps=settings.adamw.eps,
        weight_decay=settings.adamw.weight_decay,
    )
    adaptive = settings.loss == "taid"
    schedule = make_schedule(**settings.schedule())
    steps: dict[str, list[float]] = {key: [] for key in STEP_KEYS}
    for step in range(last or settings.steps):
        rate = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        t = float(schedule.t)
        batch = {key: torch.tensor(batches[key][step]) for key in BATCH_KEYS}
        distil, lm = _batch_losses(settings, student, teacher, batch, t, loss)
        total = lm if distil is None else _mixed(settings.distil_ratio, distil, lm)
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            student.parameters(), settings.clip_global_norm
        )
        optimizer.step()
        if adaptive and distil is not None:
            schedule.update(distil.detach(), step)
        after = float(schedule.t)
        values = (
            total,
            lm,
            t if adaptive else math.nan,
            after if adaptive else math.nan,
            norm,
            rate,
        )
        for key, value in zip(STEP_KEYS, values, strict=True):
            steps[key].append(float(torch.as_tensor(value).detach()))
    return {key: np.array(value, np.float32) for key, value in steps.items()}, student


def _mixed(ratio: float, distil: Tensor, lm: Tensor) -> Tensor:
    return distil if ratio == 1.0 else (1 - ratio) * lm + ratio * distil


def _batch_losses(
    settings: RunSettings,
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    batch: dict[str, Tensor],
    t: float,
    loss: TorchLoss,
) -> tuple[Tensor | None, Tensor]:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    # Position i predicts label i + 1.
    labels = batch["labels"][:, 1:]
    mask = (labels != -100).int()
    logits = student(**inputs).logits[:, :-1]
    with torch.no_grad():
        target = teacher(**inputs).logits[:, :-1]
    lm = published_loss("sft", logits, target, mask, labels, Settings())
    if settings.loss == "sft":
        return None, lm
    numbers = Settings(t=t)
    return loss(settings.objective, logits, target, mask, labels, numbers), lm


def finish_run(
    folder: pathlib.Path, steps: dict[str, np.ndarray], student: torch.nn.Module
) -> None:
    """Writes what a run ends with."""
    np.savez_compressed(folder / "run.npz", **steps)
    student.save_pretrained(folder / "student_final")  # pyright: ignore[reportCallIssue]


def record_run(
    folder: pathlib.Path,
    settings: RunSettings,
    seed: int,
    loss: TorchLoss = published_loss,
    make_schedule: schedules.MakeSchedule = PublishedSchedule,
) -> None:
    """Writes a whole run with new models and batches."""
    new_run(folder, settings, seed)
    with np.load(folder / "batches.npz") as arrays:
        batches = {key: arrays[key] for key in BATCH_KEYS}
    steps, student = train(folder, settings, batches, loss, make_schedule)
    finish_run(folder, steps, student)


def rerun(
    run: Run,
    folder: pathlib.Path,
    loss: TorchLoss = published_loss,
    make_schedule: schedules.MakeSchedule = PublishedSchedule,
) -> None:
    """Writes a recorded run again, from its own start, with another PyTorch side."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("teacher", "student_init"):
        shutil.copytree(run.folder / name, folder / name)
    for name in ("run.json", "batches.npz"):
        shutil.copyfile(run.folder / name, folder / name)
    steps, student = train(run.folder, run.settings, run.batches, loss, make_schedule)
    finish_run(folder, steps, student)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and records."""
    parser = argparse.ArgumentParser("python -m parity.record", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    record_losses(chosen.folder, chosen.seed)
    record_schedule(chosen.folder, chosen.seed)
    for loss in ("taid", "sft"):
        settings = dataclasses.replace(RunSettings(), loss=loss, steps=chosen.steps)
        record_run(chosen.folder / f"run_{loss}", settings, chosen.seed)


if __name__ == "__main__":
    main()
