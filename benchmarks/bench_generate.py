"""Times greedy answers beside those of `transformers` in PyTorch.

Both sides have the same weights (SmolLM2-135M-Instruct, fetched from the package index,
or a model that is named), the same prompts padded on the left, a cache of keys and
values, float32, and the same number of threads; neither stops at an end token. They run
in turn within one process, so that a drift of the machine's speed falls on both;
medians are compared. Compilation is in the first run, which is told apart, and so is
what `prepare` takes, once for all runs, as loading does for PyTorch.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from taid_jax.data import pad_left
from taid_jax.models.files.load import LoadedModel, export_model, load_model
from taid_jax.models.generation import generate, prepare

QUESTIONS = (
    "What is a list comprehension?",
    "Explain in a few words what the moon does to the sea.",
    "Write a short letter to a friend who has moved to another town.",
    "Why is the sky blue?",
    "Name three rivers of Europe and the seas that they flow into.",
    "How does one boil an egg?",
    "What is the difference between a stack and a queue? Give an example of each.",
    "What comes next: 2, 4, 8, 16?",
)


def make_prompts(model: LoadedModel, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask of questions, padded on the left."""
    if model.tokenizer is None:
        raise SystemExit(f"error: {model.source} has no tokenizer")
    rows = [
        model.tokenizer.encode(QUESTIONS[number % len(QUESTIONS)])
        for number in range(batch)
    ]
    return pad_left(rows)


def jax_side(
    model: LoadedModel, ids: np.ndarray, mask: np.ndarray, tokens: int
) -> tuple[Callable[[], np.ndarray], float]:
    """Returns a function that answers once, and the seconds of `prepare` before it."""
    jax.block_until_ready(prepare(model.params, model.config))
    began = time.perf_counter()
    prepared = jax.block_until_ready(prepare(model.params, model.config))
    seconds = time.perf_counter() - began

    def run() -> np.ndarray:
        return np.asarray(
            generate(
                prepared,
                model.config,
                jnp.asarray(ids),
                jnp.asarray(mask),
                max_new_tokens=tokens,
                eos_token_ids=(),
                pad_token_id=0,
            ).tokens
        )

    return run, seconds


def torch_side(
    model: LoadedModel, ids: np.ndarray, mask: np.ndarray, tokens: int
) -> Callable[[], np.ndarray]:
    """Returns the same in PyTorch, from an exported folder."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        export_model(path, model.config, model.params, model.tokenizer)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    given = torch.from_numpy(ids).long()
    visible = torch.from_numpy(mask).long()

    def run() -> np.ndarray:
        with torch.inference_mode():
            # The declared type of what from_pretrained gives lacks what generate needs.
            found = theirs.generate(  # pyright: ignore[reportAttributeAccessIssue]
                given,
                attention_mask=visible,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return found[:, ids.shape[1] :].numpy()

    return run


def main(arguments: Sequence[str]) -> int:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="new ones, each row")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    args = parser.parse_args(arguments)

    model = load_model(args.model)
    ids, mask = make_prompts(model, args.batch_size)
    run, preparing = jax_side(model, ids, mask, args.tokens)
    sides = {"taid_jax": run}
    try:
        import torch

        torch.set_num_threads(args.threads)
        sides["PyTorch"] = torch_side(model, ids, mask, args.tokens)
    except ImportError:
        print("PyTorch is not installed: pip install 'torch<2.14'", file=sys.stderr)

    first: dict[str, float] = {}
    answers: dict[str, np.ndarray] = {}
    for name, run in sides.items():
        began = time.perf_counter()
        answers[name] = run()
        first[name] = time.perf_counter() - began
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    given = args.batch_size * args.tokens
    found = {
        name: {
            "tokens_per_second": given / statistics.median(times),
            "median_seconds": statistics.median(times),
            "min_seconds": min(times),
            "max_seconds": max(times),
            "first_run_seconds": first[name],
        }
        for name, times in seconds.items()
    }
    print(
        f"{args.model}: {args.batch_size} prompts of up to {ids.shape[1]} tokens, "
        f"{args.tokens} new ones each, float32, {jax.devices()[0].device_kind}, "
        f"{args.rounds} runs each"
    )
    for name, row in found.items():
        print(
            f"{name:10} {row['tokens_per_second']:8.1f} tokens/s   median "
            f"{row['median_seconds']:.2f} s  ({row['min_seconds']:.2f} to "
            f"{row['max_seconds']:.2f}), first {row['first_run_seconds']:.1f} s"
        )
    print(f"taid_jax prepares the weights once before that, in {preparing:.2f} s")
    if len(found) == 2:
        ours, theirs = found.values()
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        fastest = theirs["min_seconds"] / ours["min_seconds"]
        same = np.mean(answers["taid_jax"] == answers["PyTorch"])
        print(
            f"ratio      {ratio:8.2f}   (of the fastest runs {fastest:.2f}); "
            f"{same:.1%} of the tokens are the same"
        )
    if args.json:
        figures = {**found, "prepare_seconds": preparing}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
