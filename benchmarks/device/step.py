"""Section C: the train step of a 1B student and a 3B teacher, random weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from device.rows import (
    Figures,
    Options,
    Row,
    median_ms,
    torch_device,
    torch_peak_gib,
)
from device.shapes import only, student_config, teacher_config
from taid_jax import loss
from taid_jax.chips import peak_flops
from taid_jax.models.decoder import decoder_functions, init_params
from taid_jax.models.families import write_config
from taid_jax.schedule import TAIDScheduler
from taid_jax.sharding import activations_on
from taid_jax.store.teacher import head_params, stored_functions
from taid_jax.train.state import init_state, make_optimizer
from taid_jax.train.step import batch_loss, make_train_step
from taid_jax.train.throughput import step_flops
from taid_jax.types import ModelFunctions, Params

REMATS = ("none", "full", "dots")
ROUNDS, T = 3, 0.4


def shapes(small: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns sequences and their length: 8k tokens, then 16k."""
    return ((2, 64), (4, 64)) if small else ((4, 2048), (8, 2048))


def jax_rows(options: Options) -> list[Row]:
    """Returns the rows of the step, what is asked of it first."""
    pair = Pair(options.small)
    first, second = shapes(options.small)

    def row(shape: tuple[int, int], remat: str, teacher: str = "live") -> Row:
        name = step_name(shape, f"{teacher} teacher, remat {remat}")
        return name, functools.partial(time_step, pair, shape, remat, teacher)

    return [
        row(first, "none"),
        row(first, "none", "stored"),
        (
            f"parts of {step_name(first, 'live teacher, remat none')}",
            functools.partial(time_parts, pair, first),
        ),
        row(second, "none"),
        *(row(first, remat) for remat in REMATS[1:]),
        *(row(second, remat) for remat in REMATS[1:] if not options.small),
    ]


def step_name(shape: tuple[int, int], what: str) -> str:
    """Returns the name of the row of a step."""
    return f"{shape[0] * shape[1]:,} tokens, {what}"


class Pair:
    """Student and teacher, whose weights are made when they are asked for."""

    def __init__(self, small: bool):
        self.student, self.teacher = student_config(small), teacher_config(small)

    @functools.cached_property
    def teacher_params(self) -> Params:
        """The teacher's weights, in the dtype that it computes in."""
        make = jax.jit(init_params, static_argnums=(0, 2))
        return make(self.teacher, jax.random.key(1), jnp.bfloat16)

    def student_params(self) -> dict[str, Any]:
        """The student's master weights, which a step takes over."""
        make = jax.jit(init_params, static_argnums=0)
        return make(self.student, jax.random.key(0))

    def functions(self, remat: str) -> tuple[ModelFunctions, ModelFunctions]:
        """What the step needs of both."""
        return (
            decoder_functions(self.student, dtype=jnp.bfloat16, remat=remat),
            decoder_functions(self.teacher, dtype=jnp.bfloat16),
        )


def make_batch(pair: Pair, shape: tuple[int, int]) -> dict[str, Array]:
    """Returns tokens without padding, all of which count."""
    ids = np.random.default_rng(0).integers(0, pair.student.vocab_size, shape, np.int32)
    return {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(ids)}


def throughput(
    ms: float, pair: Pair, shape: tuple[int, int], kind: str, *, stored: bool = False
) -> Figures:
    """Returns tokens per second and MFU; the same count for JAX and PyTorch."""
    batch, length = shape
    flops = step_flops(
        pair.student,
        pair.teacher,
        batch=batch,
        length=length,
        stored=["hidden"] if stored else [],
    ).total(batch * (length - 1))
    peak = peak_flops(kind)
    return {
        "ms": ms,
        "tokens_per_second": 1e3 * batch * length / ms,
        "mfu": None if peak is None else 1e3 * flops / ms / peak,
    }


def time_step(pair: Pair, shape: tuple[int, int], remat: str, teacher: str) -> Figures:
    """Returns the figures of the train step with a live or a stored teacher."""
    student, live = pair.functions(remat)
    functions, teacher_params = live, pair.teacher_params
    batch = make_batch(pair, shape)
    if teacher == "stored":
        functions = stored_functions("hidden", pair.teacher, dtype=jnp.bfloat16)
        teacher_params = head_params(pair.teacher_params, pair.teacher)
        batch["teacher_hidden"] = hidden_of(live)(pair.teacher_params, batch)
    optimizer, scheduler = make_optimizer(1e-4), TAIDScheduler(1000)
    step = make_train_step(
        student,
        functions,
        make_objective=lambda schedule, learned, step: loss.TAID(schedule.t),
        scheduler=scheduler,
        optimizer=optimizer,
        mesh=only(jax.devices()[0]),
    )
    init = functools.partial(init_state, optimizer=optimizer, schedule=scheduler.init())
    state = jax.jit(init, donate_argnums=0)(pair.student_params())
    compiled = (
        jax.jit(step, donate_argnums=0).lower(state, teacher_params, batch).compile()
    )

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, teacher_params, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    kind = jax.devices()[0].device_kind
    stored = teacher == "stored"
    figures = throughput(median_ms(run, ROUNDS), pair, shape, kind, stored=stored)
    memory = compiled.memory_analysis()
    if memory is not None:
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        used += memory.output_size_in_bytes - memory.alias_size_in_bytes
        figures["memory_gib"] = used / 2**30
    return figures


def hidden_of(functions: ModelFunctions) -> Callable[..., Array]:
    """Returns the jitted function that gives a model's hidden states."""
    hidden = functions.hidden
    if hidden is None:
        raise TypeError("the decoder gives hidden states")

    @jax.jit
    def of(params: Params, batch: Any) -> Array:
        with activations_on(only(jax.devices()[0])):
            return hidden(params, batch)

    return of


def time_parts(pair: Pair, shape: tuple[int, int]) -> Figures:
    """Returns the time of each part of the step by itself, a program each.

    Together they leave out the optimizer, and XLA may do two parts of a step at once.
    """
    student, teacher = pair.functions("none")
    student_params, batch = pair.student_params(), make_batch(pair, shape)
    of_student, of_teacher = hidden_of(student), hidden_of(teacher)
    # Stand for hidden states, so that the head is alone.
    given = of_student(student_params, batch), of_teacher(pair.teacher_params, batch)

    @jax.jit
    @jax.grad
    def student_pass(params: Params, batch: Any) -> Array:
        return jnp.sum(of_student(params, batch).astype(jnp.float32))

    given_hidden = ModelFunctions(
        lambda both, batch: both[0], lambda both: loss.Head(both[1], transposed=True)
    )

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def head_pass(hidden: Any, weights: Any, teacher: Any, batch: Any) -> Array:
        both: Any = (hidden, weights)
        total, sums = batch_loss(
            loss.TAID(jnp.float32(T)),
            given_hidden,
            both,
            given_hidden,
            teacher,
            batch,
            mesh=only(jax.devices()[0]),
        )
        return total / sums["num_tokens"]

    weights, teacher_weights = (
        params["embed"]["embedding"] for params in (student_params, pair.teacher_params)
    )

    def ms(function: Callable[..., Any], *arguments: Any) -> float:
        return median_ms(lambda: jax.block_until_ready(function(*arguments)), ROUNDS)

    return {
        "teacher_ms": ms(of_teacher, pair.teacher_params, batch),
        "student_forward_ms": ms(of_student, student_params, batch),
        "student_both_ways_ms": ms(student_pass, student_params, batch),
        "head_ms": ms(head_pass, given[0], weights, (given[1], teacher_weights), batch),
    }


def torch_rows(options: Options) -> list[Row]:
    """Returns the rows of the same step in transformers."""
    pair = Pair(options.small)
    return [
        (
            step_name(shape, f"transformers{', layers again' * again}"),
            functools.partial(time_torch, options, pair, shape, again),
        )
        for shape in shapes(options.small)
        for again in (False, True)
    ]


def time_torch(
    options: Options, pair: Pair, shape: tuple[int, int], again: bool
) -> Figures:
    """Returns the figures of the step in PyTorch, with the models of transformers.

    As ours: float32 masters, computed in bfloat16; a teacher in bfloat16; AdamW, a
    clipped norm, TAID in float32 on whole logits.

    Args:
        options: Of the section.
        pair: Whose architectures they are.
        shape: Of the batch.
        again: Compute each layer again in the backward pass.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch_device(options)

    def model(config: Any, dtype: Any) -> Any:
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return LlamaForCausalLM(LlamaConfig.from_dict(write_config(config)))
        finally:
            torch.set_default_dtype(torch.float32)

    teacher = model(pair.teacher, torch.bfloat16).eval()
    student = model(pair.student, torch.float32).train()
    if again:
        student.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=1e-4, weight_decay=0.01, fused=True
    )
    ids = torch.randint(0, pair.student.vocab_size, shape, device=device)
    torch_peak_gib(device)

    def run() -> float:
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                target = teacher(input_ids=ids, use_cache=False).logits[:, :-1].float()
            logits = student(input_ids=ids, use_cache=False).logits[:, :-1].float()
        mixed = torch.softmax((1 - T) * logits.detach() + T * target, dim=-1)
        value = -(mixed * torch.log_softmax(logits, dim=-1)).sum(-1).mean()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(value.detach())

    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    figures = throughput(median_ms(run, ROUNDS), pair, shape, kind)
    peak = torch_peak_gib(device)
    return figures if peak is None else {**figures, "memory_gib": peak}
