"""Times forward and backward of a student beside the same in PyTorch.

Both sides have SmolLM2-135M's shapes (random weights), float32, the same batch and
number of threads, and the mean next-token cross-entropy; ours runs through the fused
head, PyTorch's through `transformers` with labels. They run in turn within one process,
so that a drift of the machine's speed falls on both; medians are compared.
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
import jax.numpy as jnp
import numpy as np
from jax import Array

from taid_jax.loss import CrossEntropy, fused_loss
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import decoder_functions, init_params
from taid_jax.models.families import write_config
from taid_jax.models.presets import preset
from taid_jax.types import Params


def jax_side(
    config: DecoderConfig, ids: np.ndarray, unroll: int = 1
) -> Callable[[], float]:
    """Returns a function that computes the loss and all gradients once."""
    functions = decoder_functions(config, unroll=unroll)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    if functions.hidden is None or functions.head is None:
        raise TypeError("the decoder gives hidden states and a head")
    hidden_of, head_of = functions.hidden, functions.head

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradients(params: Params, ids: Array) -> Array:
        hidden = hidden_of(params, {"input_ids": ids})[:, :-1]
        labels = ids[:, 1:]
        head = head_of(params)
        # The objective looks at no teacher: any head will do.
        total, sums = fused_loss(
            CrossEntropy(), hidden, head, hidden, head, jnp.ones_like(labels), labels
        )
        return total / sums["num_tokens"]

    given = jnp.asarray(ids)
    lowered = loss_and_gradients.lower(params, given)
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    temporary = "?" if memory is None else f"{memory.temp_size_in_bytes / 2**20:.0f}"
    print(f"unroll {unroll}: compiled in {seconds:.1f} s, {temporary} MiB temporary")

    def run() -> float:
        loss, gradients = compiled(params, given)
        jax.block_until_ready(gradients)
        return float(loss)

    return run


def torch_side(config: DecoderConfig, ids: np.ndarray) -> Callable[[], float]:
    """Returns the same in PyTorch, with the model of `transformers`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_dict(write_config(config))).train()
    given = torch.from_numpy(ids).long()

    def run() -> float:
        model.zero_grad()
        loss = model(input_ids=given, labels=given, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return run


def main(arguments: Sequence[str]) -> int:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument(
        "--unroll", type=int, nargs="+", default=[1], help="layers in a turn"
    )
    parser.add_argument("--no-torch", action="store_true", help="ours alone")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    args = parser.parse_args(arguments)

    config = dataclasses.replace(preset("smollm2-135m"), num_layers=args.layers)
    shape = (args.batch_size, args.seq_len)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    ids = ids.astype(np.int32)
    sides = {"taid_jax": jax_side(config, ids, args.unroll[0])}
    for unroll in args.unroll[1:]:
        sides[f"unroll {unroll}"] = jax_side(config, ids, unroll)
    try:
        if args.no_torch:
            raise ImportError
        import torch

        torch.set_num_threads(args.threads)
        sides["PyTorch"] = torch_side(config, ids)
    except ImportError:
        if not args.no_torch:
            print("PyTorch is not installed: pip install 'torch<2.14'", file=sys.stderr)
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    print(
        f"{args.batch_size} x {args.seq_len} tokens, {args.layers} layers, float32, "
        f"{jax.devices()[0].device_kind}, {args.rounds} runs each"
    )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(
            f"{name:10} {ids.size / medians[name]:8.1f} tokens/s   median "
            f"{medians[name]:.3f} s  ({min(times):.3f} to {max(times):.3f})"
        )
    if len(medians) == 2:
        ratio = medians["PyTorch"] / medians["taid_jax"]
        fastest = min(seconds["PyTorch"]) / min(seconds["taid_jax"])
        print(f"ratio      {ratio:8.2f}   (of the fastest runs {fastest:.2f})")
    if args.json:
        args.json.write_text(json.dumps(seconds, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
