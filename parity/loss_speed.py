"""The PyTorch columns of `benchmarks/bench_loss.py`, ready to time."""

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from parity.torch_reference import OBJECTIVES, Settings, published_loss

Step = Callable[[], float]
"""Runs value and gradients once, waits for them, and gives the value."""


def _tensors(
    arrays: dict[str, np.ndarray], dtype: str, device: str
) -> dict[str, torch.Tensor]:
    made = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(np.array(array)).to(device)
        made[name] = tensor.to(getattr(torch, dtype)) if array.ndim == 2 else tensor
    # PyTorch's linear layers hold their kernels as (vocab, d_model).
    for name in ("student_kernel", "teacher_kernel"):
        made[name] = made[name].T.contiguous()
    for name in ("student_hidden", "student_kernel"):
        made[name].requires_grad_()
    return made


def _step(tensors: dict[str, torch.Tensor], loss: Callable[[], torch.Tensor]) -> Step:
    moving = tensors["student_hidden"], tensors["student_kernel"]

    def run() -> float:
        value = loss()
        torch.autograd.grad(value, moving)
        return value.item()

    return run


def published_columns(
    objective: str,
    arrays: dict[str, np.ndarray],
    *,
    t: float,
    dtype: str,
    threads: int,
) -> dict[str, Step]:
    """Returns the published loss on whole logits, eager and compiled.

    Args:
        objective: As on the command line of the trainer; those without a published
            form have no column.
        arrays: `student_hidden` (tokens, d), `student_kernel` (d, vocab), the same of
            the teacher, `mask` and `labels` (tokens,).
        t: TAID's interpolation.
        dtype: "float32" or "bfloat16".
        threads: That PyTorch may use.
    """
    if objective not in OBJECTIVES:
        return {}
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = _tensors(arrays, dtype, device)
    mask, labels = made["mask"].float(), made["labels"].long()
    settings = Settings(t=t)

    def loss(hidden: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        student = functional.linear(hidden, kernel)
        with torch.no_grad():
            teacher = functional.linear(made["teacher_hidden"], made["teacher_kernel"])
        return published_loss(objective, student, teacher, mask, labels, settings)

    compiled = torch.compile(loss)
    moving = made["student_hidden"], made["student_kernel"]
    return {
        "published, eager": _step(made, lambda: loss(*moving)),
        "published, compiled": _step(made, lambda: compiled(*moving)),
    }


def liger_columns(arrays: dict[str, np.ndarray], *, dtype: str) -> dict[str, Step]:
    """Returns Liger-Kernel's fused linear JSD, where it and a GPU are at hand."""
    if not torch.cuda.is_available():
        return {}
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearJSD,
    )

    made = _tensors(arrays, dtype, "cuda")
    divergence = LigerFusedLinearJSD(jsd_beta=0.5)
    labels = torch.where(made["mask"] != 0, made["labels"].long(), -100)
    names = ("student_hidden", "student_kernel", "teacher_hidden", "teacher_kernel")
    heads = tuple(made[name] for name in names)
    return {"Liger, fused JSD": _step(made, lambda: divergence(*heads, labels))}
