"""Times the fused head beside the same loss on whole logits, in JAX and in PyTorch.

Every column computes a loss and its gradient in the student's hidden states and head.
The first is the limit: the four matrix products alone. Columns run in turn within one
process, so that a drift of the machine's speed falls on all; medians are compared.
Temporary memory is XLA's own account. Without --tokens two sizes are measured: a
SmolLM2-135M teacher and student, and a Llama-like pair of unequal width.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Beside PyTorch on one GPU, neither may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from taid_jax import loss

Step = Callable[[], object]

SIZES = ((1024, 576, 576, 49152), (2048, 512, 1024, 32000))
"""Tokens, the student's and the teacher's d_model, vocabulary."""

OBJECTIVES: dict[str, Callable[[float], Any]] = {
    "taid": lambda t: loss.TAID(jnp.float32(t)),
    "forward_kl": lambda t: loss.ForwardKL(),
    "reverse_kl": lambda t: loss.ReverseKL(),
    "jensen_shannon": lambda t: loss.JensenShannon(),
    "total_variation": lambda t: loss.TotalVariation(),
    "skew_forward_kl": lambda t: loss.SkewForwardKL(),
    "skew_reverse_kl": lambda t: loss.SkewReverseKL(),
    "alpha_mixture": lambda t: loss.AlphaMixture(jnp.float32(t), 0),
    "alpha_beta": lambda t: loss.AlphaBeta(),
    "concrete_score": lambda t: loss.ConcreteScore(),
    "entropy_gated": lambda t: loss.EntropyGated(1.0),
    "ctkd": lambda t: loss.CTKD(jnp.float32(4.0)),
    "dkd": lambda t: loss.DKD(),
    "sft": lambda t: loss.CrossEntropy(),
    "adaptive_kl": lambda t: loss.AdaptiveKL(),
}
"""By the trainer's names; the last sorts the vocabulary."""


@dataclasses.dataclass
class Column:
    """One way to compute the loss, and what was measured of it."""

    step: Step
    temp_bytes: int | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    first_seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Returns the figures for the table and the file."""
        return {
            "median_seconds": statistics.median(self.seconds),
            "min_seconds": min(self.seconds),
            "max_seconds": max(self.seconds),
            "temp_bytes": self.temp_bytes,
            "first_seconds": self.first_seconds,
        }


def make_arrays(size: Sequence[int], seed: int) -> dict[str, np.ndarray]:
    """Returns hidden states, kernels (d_model, vocab), a mask of ones, and labels."""
    tokens, student, teacher, vocab = size
    rng = np.random.default_rng(seed)

    def normal(rows: int, columns: int, scale: float) -> np.ndarray:
        return rng.standard_normal((rows, columns), np.float32) * np.float32(scale)

    return {
        "student_hidden": normal(tokens, student, 1.0),
        "student_kernel": normal(student, vocab, 2 * student**-0.5),
        "teacher_hidden": normal(tokens, teacher, 1.0),
        "teacher_kernel": normal(teacher, vocab, 2 * teacher**-0.5),
        "mask": np.ones(tokens, np.float32),
        "labels": rng.integers(0, vocab, tokens).astype(np.int32),
    }


def compiled_column(function: Callable[..., object], *arguments: object) -> Column:
    """Returns a column of a JAX function, compiled for its arguments."""
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return Column(
        lambda: jax.block_until_ready(compiled(*arguments)),
        None if memory is None else memory.temp_size_in_bytes,
    )


def limit_column(arrays: dict[str, jax.Array]) -> Column:
    """Returns the four products of a step, each on operands of its own."""
    h, kernel = arrays["student_hidden"], arrays["student_kernel"]
    shape = h.shape[0], kernel.shape[1]
    in_logits = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(h.dtype)

    def products(h, kernel, teacher_h, teacher_kernel, g) -> tuple[jax.Array, ...]:
        def dot(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.dot(a, b, preferred_element_type=jnp.float32)

        return (
            dot(h, kernel),
            dot(teacher_h, teacher_kernel),
            dot(g, kernel.T),
            dot(h.T, g),
        )

    teacher = arrays["teacher_hidden"], arrays["teacher_kernel"]
    return compiled_column(products, h, kernel, *teacher, in_logits)


def loss_column(
    objective: Any, arrays: dict[str, jax.Array], *, fused: bool, chunk: int | None
) -> Column:
    """Returns the mean loss and its gradients, by the fused head or whole logits."""

    def mean(objective, h, kernel, teacher_h, teacher_kernel, mask, labels):
        heads = loss.Head(kernel), loss.Head(teacher_kernel)
        if fused:
            total, sums = loss.fused_loss(
                objective, h, heads[0], teacher_h, heads[1], mask, labels,
                chunk_size=chunk,
            )  # fmt: skip
        else:
            logits = heads[0].logits(h), heads[1].logits(teacher_h)
            total, sums = loss.distillation_sums(objective, *logits, mask, labels)
        return total / sums["num_tokens"]

    return compiled_column(
        jax.value_and_grad(mean, argnums=(1, 2)), objective, *arrays.values()
    )


def difference(ours: Column, other: Column) -> float:
    """Returns how far gradients are apart, as a share of their norm."""
    pairs = zip(ours.step()[1], other.step()[1], strict=True)  # pyright: ignore
    apart = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in (
        [np.asarray(x, np.float32) for x in pair] for pair in pairs
    )]  # fmt: skip
    return float(max(apart))


def measure(columns: dict[str, Column], rounds: int, *, processor: bool) -> None:
    """Fills in the seconds of every column, which take turns.

    Those that the process was computing for, where `processor`: on one core, that is
    steady on a machine that others use as well.
    """
    clock = time.process_time if processor else time.perf_counter
    for column in columns.values():
        began = time.perf_counter()
        column.step()
        column.first_seconds = time.perf_counter() - began
    for _ in range(rounds):
        for column in columns.values():
            began = clock()
            column.step()
            column.seconds.append(clock() - began)


def masked(arrays: dict[str, jax.Array], fraction: float) -> dict[str, jax.Array]:
    """Returns arrays of which a share of the tokens, scattered, does not count."""
    tokens = arrays["mask"].shape[0]
    out = np.random.default_rng(1).permutation(tokens)[: round(fraction * tokens)]
    return {**arrays, "mask": arrays["mask"].at[out].set(0)}


def torch_columns(
    name: str, arrays: dict[str, np.ndarray], args: argparse.Namespace
) -> dict[str, Column]:
    """Returns the published loss on whole logits, eager and compiled by PyTorch.

    Raises:
        ImportError: If PyTorch is not there.
    """
    import torch
    from torch.nn.functional import linear

    from parity.torch_reference import OBJECTIVES, Settings, published_loss

    if name not in OBJECTIVES:
        return {}
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = {key: torch.from_numpy(array).to(device) for key, array in arrays.items()}
    for key, tensor in made.items():
        if tensor.ndim == 2:
            # PyTorch's linear layers hold their kernels as (vocab, d_model).
            tensor = tensor.T.contiguous() if "kernel" in key else tensor
            made[key] = tensor.to(getattr(torch, args.dtype))
    mask, labels = made["mask"].float(), made["labels"].long()
    moving = [
        made[key].requires_grad_() for key in ("student_hidden", "student_kernel")
    ]

    def value(hidden: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher = linear(made["teacher_hidden"], made["teacher_kernel"])
        logits = linear(hidden, kernel)
        return published_loss(name, logits, teacher, mask, labels, Settings(t=args.t))

    def step(value: Callable[..., torch.Tensor]) -> Step:
        def run() -> float:
            found = value(*moving)
            torch.autograd.grad(found, moving)
            return found.item()

        return run

    return {
        "published, eager": Column(step(value)),
        "published, compiled": Column(step(torch.compile(value))),
    }


def make_columns(size: Sequence[int], args: argparse.Namespace) -> dict[str, Column]:
    """Returns the columns to be measured, the limit first and the fused head next."""
    plain = make_arrays(size, args.seed)
    dtype = jnp.dtype(args.dtype)
    arrays = {
        name: jnp.asarray(x, dtype if x.ndim == 2 else x.dtype)
        for name, x in plain.items()
    }
    name = "taid" if args.objective == "all" else args.objective
    objective = OBJECTIVES[name](args.t)
    columns = {
        "limit": limit_column(arrays),
        "fused": loss_column(objective, arrays, fused=True, chunk=args.chunk_size),
        "fused, masked": loss_column(
            objective,
            masked(arrays, args.masked_fraction),
            fused=True,
            chunk=args.chunk_size,
        ),
        "plain JAX": loss_column(objective, arrays, fused=False, chunk=None),
    }
    if args.objective == "all":
        for other, make in OBJECTIVES.items():
            if other != name:
                columns[f"fused, {other}"] = loss_column(
                    make(args.t), arrays, fused=True, chunk=args.chunk_size
                )
    if not args.no_torch:
        try:
            columns |= torch_columns(name, plain, args)
        except ImportError:
            print("PyTorch is not installed: pip install 'torch<2.14'", file=sys.stderr)
    return columns


def report(
    size: Sequence[int], columns: dict[str, Column], apart: float
) -> dict[str, Any]:
    """Prints the table of one size and returns its figures."""
    tokens, student, teacher, vocab = size
    found = {name: column.summary() for name, column in columns.items()}
    limit = found["limit"]
    print(f"\n{tokens} x ({student}, {teacher}) x {vocab}")
    print(f"{'':24} {'median':>8} {'min':>8} {'max':>8}  {'ratio':>6} {'temp MiB':>9}")
    for name, row in found.items():
        row["ratio"] = row["median_seconds"] / limit["median_seconds"]
        row["ratio_of_minima"] = row["min_seconds"] / limit["min_seconds"]
        temp = row["temp_bytes"]
        print(
            f"{name:24} {row['median_seconds']:8.3f} {row['min_seconds']:8.3f} "
            f"{row['max_seconds']:8.3f}  {row['ratio']:6.2f} "
            + (" " * 9 if temp is None else f"{temp / 2**20:9.0f}")
        )
    fused, plain = found["fused"], found["plain JAX"]
    share = found["fused, masked"]["median_seconds"] / fused["median_seconds"]
    print(f"masked / all counted: {share:.2f}; gradients {apart:.1e} from plain JAX's")
    if fused["temp_bytes"] and plain["temp_bytes"]:
        most = plain["temp_bytes"] / 8 + 4 * student * vocab
        print(
            f"temp memory {fused['temp_bytes'] / 2**20:.0f} MiB; an eighth of plain "
            f"JAX's and one gradient of the head: {most / 2**20:.0f} MiB"
        )
    return {
        "size": dict(zip(("tokens", "student", "teacher", "vocab"), size, strict=True)),
        "columns": found,
        "masked_share": share,
        "gradient_difference": apart,
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, help="one size instead of the two rows")
    parser.add_argument("--student-dim", type=int, default=576)
    parser.add_argument("--teacher-dim", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--objective", choices=[*OBJECTIVES, "all"], default="taid")
    parser.add_argument("--t", type=float, default=0.4, help="TAID's interpolation")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--masked-fraction", type=float, default=0.5)
    parser.add_argument("--chunk-size", type=int, help="tokens; chosen when left out")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each column")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="for a shared machine, with `taskset -c 0` and --threads 1",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="PyTorch's")
    parser.add_argument("--no-torch", action="store_true", help="JAX's columns only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    args = parser.parse_args(arguments)
    if not 0 <= args.masked_fraction <= 1:
        parser.error(f"need 0 <= --masked-fraction <= 1, got {args.masked_fraction}")
    if args.rounds < 1:
        parser.error(f"need --rounds >= 1, got {args.rounds}")
    return args


def main(arguments: Sequence[str]) -> int:
    """Measures and prints the table."""
    args = parse(arguments)
    sizes = SIZES
    if args.tokens:
        sizes = ((args.tokens, args.student_dim, args.teacher_dim, args.vocab),)
    device = jax.devices()[0].device_kind
    print(f"{args.objective}, {args.dtype}, {device}, {os.cpu_count()} CPU cores")
    rows = []
    for size in sizes:
        columns = make_columns(size, args)
        measure(columns, args.rounds, processor=args.processor_time)
        apart = difference(columns["fused"], columns["plain JAX"])
        rows.append(report(size, columns, apart))
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        about = {"jax": jax.__version__, "device": device, "settings": settings}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
