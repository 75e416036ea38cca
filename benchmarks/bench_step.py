"""Times the train step of the default job beside the same step written in PyTorch.

Both sides have the default job's shapes (a SmolLM2-135M teacher and a student with some
of its layers, random weights), float32, AdamW, a clipped norm, TAID, and the same
number of threads. They run in turn within one process, a few steps each, so that a
drift of the machine's speed falls on both; medians are compared.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from taid_jax import loss
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import decoder_functions, init_params
from taid_jax.models.families import write_config
from taid_jax.models.presets import preset
from taid_jax.schedule import TAIDScheduler
from taid_jax.settings import Settings
from taid_jax.train.state import init_state, make_optimizer
from taid_jax.train.step import make_train_step

SMOLLM2 = preset("smollm2-135m")


def with_layers(layers: int) -> DecoderConfig:
    """Returns SmolLM2's architecture with another depth."""
    return dataclasses.replace(SMOLLM2, num_layers=layers)


def jax_step(layers: int, batch: dict[str, np.ndarray]) -> Callable[[], float]:
    """Returns a function that takes one step and gives its loss."""
    student = with_layers(layers)
    optimizer = make_optimizer(1e-4)
    scheduler = TAIDScheduler(1000)
    state = init_state(
        jax.jit(init_params, static_argnums=0)(student, jax.random.key(0)),
        optimizer=optimizer,
        schedule=scheduler.init(),
    )
    teacher = jax.jit(init_params, static_argnums=0)(SMOLLM2, jax.random.key(1))
    step = make_train_step(
        decoder_functions(student),
        decoder_functions(SMOLLM2),
        make_objective=lambda schedule, learned, step: loss.TAID(schedule.t),
        scheduler=scheduler,
        optimizer=optimizer,
    )

    def run() -> float:
        nonlocal state
        state, metrics = step(state, teacher, batch)
        return float(metrics["loss"])

    return run


def torch_step(layers: int, batch: dict[str, np.ndarray]) -> Callable[[], float]:
    """Returns the same in PyTorch, with the models of `transformers`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(depth: int) -> LlamaForCausalLM:
        config = LlamaConfig.from_dict(write_config(with_layers(depth)))
        return LlamaForCausalLM(config)

    teacher, student = model(SMOLLM2.num_layers).eval(), model(layers).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.01)
    ids = torch.from_numpy(batch["input_ids"]).long()
    labels = torch.from_numpy(batch["labels"]).long()[:, 1:]
    counted = labels != -100
    t = 0.4

    def run() -> float:
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        logits = student(input_ids=ids, use_cache=False).logits[:, :-1]
        mixed = torch.softmax((1 - t) * logits.detach() + t * target, dim=-1)
        per_token = -(mixed * torch.log_softmax(logits, dim=-1)).sum(-1)
        value = (per_token * counted).sum() / counted.sum()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        return float(value)

    return run


def timed(run: Callable[[], float], steps: int) -> list[float]:
    """Returns the seconds of each step."""
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds


def main(arguments: Sequence[str]) -> int:
    """Runs the comparison and prints it."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=defaults.data.batch_size)
    parser.add_argument("--seq-len", type=int, default=defaults.data.seq_len)
    parser.add_argument(
        "--student-layers", type=int, default=defaults.model.layers_of_teacher
    )
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    args = parser.parse_args(arguments)

    rng = np.random.default_rng(0)
    shape = (args.batch_size, args.seq_len)
    ids = rng.integers(0, SMOLLM2.vocab_size, shape).astype(np.int32)
    batch = {"input_ids": ids, "labels": ids.copy()}
    sides = {"taid_jax": jax_step(args.student_layers, batch)}
    try:
        import torch

        torch.set_num_threads(args.threads)
        sides["PyTorch"] = torch_step(args.student_layers, batch)
    except ImportError:
        print("PyTorch is not installed: pip install 'torch<2.14'", file=sys.stderr)

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    first = {name: timed(run, 1)[0] for name, run in sides.items()}
    for _ in range(args.rounds):
        for name, run in sides.items():
            seconds[name] += timed(run, args.steps)
    found = {
        name: {
            "tokens_per_second": ids.size / statistics.median(times),
            "median_seconds": statistics.median(times),
            "min_seconds": min(times),
            "max_seconds": max(times),
            "first_step_seconds": first[name],
        }
        for name, times in seconds.items()
    }
    print(
        f"{args.batch_size} x {args.seq_len} tokens, {SMOLLM2.num_layers} -> "
        f"{args.student_layers} layers, float32, {args.rounds * args.steps} steps each"
    )
    for name, row in found.items():
        print(
            f"{name:10} {row['tokens_per_second']:8.1f} tokens/s   median "
            f"{row['median_seconds']:.3f} s  ({row['min_seconds']:.3f} to "
            f"{row['max_seconds']:.3f}), first {row['first_step_seconds']:.1f} s"
        )
    if len(found) == 2:
        ours, theirs = (row["tokens_per_second"] for row in found.values())
        print(f"ratio      {ours / theirs:8.2f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
