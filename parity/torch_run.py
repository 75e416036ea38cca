"""A training run in PyTorch, as the published recipe has it, and its start and end."""

import math
import pathlib
import shutil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity.published import REFERENCE, Published
from parity.recordings import save_arrays
from parity.runs import BATCH_KEYS, STEP_KEYS, Run, RunSettings, save_settings
from parity.torch_reference import Settings

_VOCAB = 256


def new_run(folder: pathlib.Path, settings: RunSettings, seed: int) -> None:
    """Writes what a run starts from: two random Llamas, batches and settings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    save_settings(folder / "run.json", settings)
    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "vocab_size": _VOCAB,
        "max_position_embeddings": 128,
        "head_dim": 16,
    }
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
    save_arrays(folder / "batches.npz", batches)


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
    published: Published = REFERENCE,
    last: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, np.ndarray], torch.nn.Module]:
    """Trains a student in PyTorch as the published recipe does, on a CPU.

    The folder has `teacher` and `student_init` in it. Returns the arrays of `run.npz`
    in that dtype, and the student after `last` steps; after all when None.
    """
    from transformers import LlamaForCausalLM

    teacher, student = (
        LlamaForCausalLM.from_pretrained(folder / name).to(dtype)  # pyright: ignore[reportArgumentType]
        for name in ("teacher", "student_init")
    )
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=settings.lr,
        betas=(settings.adamw.b1, settings.adamw.b2),
        eps=settings.adamw.eps,
        weight_decay=settings.adamw.weight_decay,
    )
    adaptive = settings.loss == "taid"
    schedule = published.schedule(**settings.schedule())
    steps: dict[str, list[float]] = {key: [] for key in STEP_KEYS}
    for step in range(last or settings.steps):
        rate = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        t = float(schedule.t)
        batch = {key: torch.tensor(batches[key][step]) for key in BATCH_KEYS}
        distil, lm = _batch_losses(settings, student, teacher, batch, t, published)
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
    kept = np.float64 if dtype == torch.float64 else np.float32
    return {key: np.array(value, kept) for key, value in steps.items()}, student


def _mixed(ratio: float, distil: Tensor, lm: Tensor) -> Tensor:
    return distil if ratio == 1.0 else (1 - ratio) * lm + ratio * distil


def _batch_losses(
    settings: RunSettings,
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    batch: dict[str, Tensor],
    t: float,
    published: Published,
) -> tuple[Tensor | None, Tensor]:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    # Position i predicts label i + 1.
    labels = batch["labels"][:, 1:]
    mask = (labels != -100).int()
    logits = student(**inputs).logits[:, :-1]
    with torch.no_grad():
        target = teacher(**inputs).logits[:, :-1]
    lm = REFERENCE.loss("sft", logits, target, mask, labels, Settings())
    if settings.loss == "sft":
        return None, lm
    numbers = Settings(t=t)
    sides = logits, target, mask, labels
    return published.loss(settings.objective, *sides, numbers), lm


def finish_run(
    folder: pathlib.Path, steps: dict[str, np.ndarray], student: torch.nn.Module
) -> None:
    """Writes what a run ends with."""
    save_arrays(folder / "run.npz", steps)
    student.save_pretrained(folder / "student_final")  # pyright: ignore[reportCallIssue]


def record_run(folder: pathlib.Path, settings: RunSettings, seed: int) -> None:
    """Writes a whole run with new models and batches."""
    new_run(folder, settings, seed)
    with np.load(folder / "batches.npz") as arrays:
        batches = {key: arrays[key] for key in BATCH_KEYS}
    steps, student = train(folder, settings, batches)
    finish_run(folder, steps, student)


def rerun(run: Run, folder: pathlib.Path, published: Published) -> None:
    """Writes a recorded run again, from its own start, with another PyTorch side."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("teacher", "student_init"):
        shutil.copytree(run.folder / name, folder / name)
    for name in ("run.json", "batches.npz"):
        shutil.copyfile(run.folder / name, folder / name)
    steps, student = train(run.folder, run.settings, run.batches, published)
    finish_run(folder, steps, student)
