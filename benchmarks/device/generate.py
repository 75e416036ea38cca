"""Section D: greedy completions by a 1B model in bfloat16, random weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from device.rows import Figures, Options, Row, median_ms, torch_device, torch_peak_gib
from device.shapes import student_config
from taid_jax.models.decoder import init_params
from taid_jax.models.families import write_config
from taid_jax.models.generation import generate, prepare

ROUNDS = 2


def lengths(small: bool) -> tuple[int, int, int]:
    """Returns prompts, their tokens, and new ones."""
    return (4, 16, 16) if small else (8, 128, 64)


def name(options: Options, what: str) -> str:
    """Returns the name of a row."""
    prompts, length, new = lengths(options.small)
    return f"{what}, {prompts} prompts of {length}, {new} new tokens each"


def jax_rows(options: Options) -> list[Row]:
    """Returns the row of ours."""
    compute = functools.partial(time_jax, options.small)
    return [(name(options, "taid_jax"), compute)]


def torch_rows(options: Options) -> list[Row]:
    """Returns the row of transformers."""
    compute = functools.partial(time_torch, options)
    return [(name(options, "transformers"), compute)]


def make_prompts(small: bool) -> np.ndarray:
    """Returns ids without padding."""
    shape, rng = lengths(small)[:2], np.random.default_rng(0)
    return rng.integers(0, student_config(small).vocab_size, shape, np.int32)


def rate(small: bool, ms: float) -> Figures:
    """Returns the time of all completions, and tokens per second of all prompts."""
    prompts, _, new = lengths(small)
    return {"ms": ms, "tokens_per_second": 1e3 * prompts * new / ms}


def time_jax(small: bool) -> Figures:
    """Returns the figures of ours; what `prepare` takes is left out."""
    config, new = student_config(small), lengths(small)[2]
    make = jax.jit(init_params, static_argnums=(0, 2))
    params = make(config, jax.random.key(0), jnp.bfloat16)
    prepared = jax.block_until_ready(prepare(params, config))
    ids = jnp.asarray(make_prompts(small))

    def run() -> Any:
        found = generate(
            prepared,
            config,
            ids,
            jnp.ones_like(ids),
            max_new_tokens=new,
            eos_token_ids=(),
            pad_token_id=0,
            dtype=jnp.bfloat16,
        )
        return jax.block_until_ready(found)

    return rate(small, median_ms(run, ROUNDS))


def time_torch(options: Options) -> Figures:
    """Returns the figures of transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch_device(options)
    config, new = student_config(options.small), lengths(options.small)[2]
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig.from_dict(write_config(config)))
    model = model.to(torch.bfloat16).eval()
    ids = torch.from_numpy(make_prompts(options.small)).long().to(device)
    torch_peak_gib(device)

    def run() -> list[Any]:
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return found.tolist()

    return rate(options.small, median_ms(run, ROUNDS))
