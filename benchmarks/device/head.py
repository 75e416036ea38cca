"""Section B: the head, beside its products, the plain form and PyTorch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_loss import Column, limit_column, loss_column
from jax import Array

from device.rows import (
    Figures,
    MissingError,
    Options,
    Row,
    median_ms,
    torch_device,
    torch_peak_gib,
)
from taid_jax import loss

DTYPES = ("bfloat16", "float32")
T, ROUNDS = 0.4, 5


def size(small: bool) -> tuple[int, int, int, int]:
    """Returns tokens, d_model of student and teacher, and the vocabulary."""
    return (256, 64, 128, 2048) if small else (8192, 2048, 4096, 128_256)


def jax_rows(options: Options) -> list[Row]:
    """Returns the rows of the products, the fused head and the plain form."""
    taid = loss.TAID(jnp.float32(T))
    fused = functools.partial(loss_column, fused=True, chunk=None)
    found: list[Row] = []
    for dtype in DTYPES:
        arrays = functools.cache(
            functools.partial(make_arrays, size(options.small), dtype)
        )
        forms: dict[str, Callable[[Any], Column]] = {
            "four products alone": limit_column,
            "fused, TAID": functools.partial(fused, taid),
            "plain, TAID": functools.partial(fused, taid, fused=False),
            "fused, forward KL": functools.partial(fused, loss.ForwardKL()),
        }
        chunks = (64, 128) if options.small else (512, 1024, 2048, 4096)
        for chunk in chunks if dtype == "bfloat16" else ():
            form = functools.partial(fused, taid, chunk=chunk)
            forms[f"fused, TAID, chunks of {chunk}"] = form
        found += [
            (f"{name}, {dtype}", functools.partial(time_jax, form, arrays))
            for name, form in forms.items()
        ]
    return found


def make_arrays(sizes: tuple[int, int, int, int], dtype: str) -> dict[str, Array]:
    """Returns what `bench_loss` takes, made on the device."""
    tokens, student, teacher, vocab = sizes

    @jax.jit
    def make(key: Array) -> dict[str, Array]:
        def normal(number: int, *shape: int, scale: float = 1.0) -> Array:
            drawn = jax.random.normal(jax.random.fold_in(key, number), shape)
            return (scale * drawn).astype(dtype)

        return {
            "student_hidden": normal(0, tokens, student),
            "student_kernel": normal(1, student, vocab, scale=2 * student**-0.5),
            "teacher_hidden": normal(2, tokens, teacher),
            "teacher_kernel": normal(3, teacher, vocab, scale=2 * teacher**-0.5),
        }

    labels = np.random.default_rng(0).integers(0, vocab, tokens, np.int32)
    mask = jnp.ones(tokens, jnp.float32)
    # A jitted function gives a dict in the order of its keys; here it is that of use.
    made = make(jax.random.key(0))
    names = ("student_hidden", "student_kernel", "teacher_hidden", "teacher_kernel")
    ordered = {name: made[name] for name in names}
    return {**ordered, "mask": mask, "labels": jnp.asarray(labels)}


def time_jax(
    form: Callable[[Any], Column], arrays: Callable[[], dict[str, Array]]
) -> Figures:
    """Returns the time of a form, and its memory beside what it is given."""
    given = arrays()
    column = form(given)
    figures: Figures = {"ms": median_ms(column.step, ROUNDS)}
    if column.temp_bytes is not None and form is not limit_column:
        gradients = (given[f"student_{name}"].nbytes for name in ("hidden", "kernel"))
        figures["memory_gib"] = (column.temp_bytes + sum(gradients)) / 2**30
    return figures


def torch_rows(options: Options) -> list[Row]:
    """Returns the rows of TAID in PyTorch, eager and compiled, and of Liger."""
    forms = {
        "PyTorch eager, TAID": plain_torch,
        "Liger, forward KL": liger,
        "torch.compile, TAID": compiled_torch,
    }
    return [
        (f"{name}, {dtype}", functools.partial(time_torch, options, form, dtype))
        for name, form in forms.items()
        for dtype in DTYPES
    ]


def plain_torch() -> Callable[..., Any]:
    """Returns TAID on whole logits, as one writes it in PyTorch."""
    import torch
    from torch.nn.functional import linear

    def mean(hidden: Any, kernel: Any, teacher: Any, teacher_kernel: Any) -> Any:
        with torch.no_grad():
            target = linear(teacher, teacher_kernel).float()
        logits = linear(hidden, kernel).float()
        mixed = torch.softmax((1 - T) * logits.detach() + T * target, dim=-1)
        return -(mixed * torch.log_softmax(logits, dim=-1)).sum(-1).mean()

    return mean


def compiled_torch() -> Callable[..., Any]:
    """Returns the same, compiled."""
    import torch

    return torch.compile(plain_torch())


def liger() -> Callable[..., Any]:
    """Returns Liger's fused head with forward KL: it has no TAID.

    Raises:
        MissingError: If it is not installed, or there is no GPU for it.
    """
    import torch

    if not torch.cuda.is_available():
        raise MissingError("Liger needs a GPU")
    try:
        from liger_kernel.transformers.fused_linear_jsd import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearJSD,
        )
    except ImportError as error:
        raise MissingError(f"Liger is not installed: {error}") from error
    # Of its generalised Jensen-Shannon divergence, 0 is forward KL.
    head = LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda *arrays: head(*arrays, None)


def time_torch(
    options: Options, form: Callable[[], Callable[..., Any]], dtype: str
) -> Figures:
    """Returns the time of a form in PyTorch, and its memory beside what it is given."""
    import torch

    device = torch_device(options)
    # JAX's default for float32 on a GPU.
    torch.backends.cuda.matmul.allow_tf32 = True
    function = form()
    tokens, student, teacher, vocab = size(options.small)
    kind = getattr(torch, dtype)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return scale * torch.randn(shape, dtype=kind, device=device)

    hidden, teacher_hidden = normal(tokens, student), normal(tokens, teacher)
    kernel, teacher_kernel = (
        normal(vocab, width, scale=2 * width**-0.5) for width in (student, teacher)
    )
    moving = [hidden.requires_grad_(), kernel.requires_grad_()]
    given = sum(x.nbytes for x in (*moving, teacher_hidden, teacher_kernel)) / 2**30
    torch_peak_gib(device)

    def step() -> float:
        value = function(*moving, teacher_hidden, teacher_kernel)
        gradients = torch.autograd.grad(value, moving)
        # Waits for the gradients as well.
        return float(value.detach() + gradients[1][0, 0])

    figures: Figures = {"ms": median_ms(step, ROUNDS)}
    peak = torch_peak_gib(device)
    if peak is not None:
        figures["memory_gib"] = peak - given
    return figures
