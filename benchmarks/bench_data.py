"""How many tokens a second the data pipeline gives, on one core unless told otherwise.

Each figure is the best of several runs in this process: reading and encoding the raw
files, reading prepared shards, and the batches of the training iterator. Seconds are
those that the process has computed, so that a busy machine does not spoil them.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import cast

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import tyro

from taid_jax.data import Dataset, Tokenizer, load_dataset, train_iterator
from taid_jax.data.corpus import pydoc_sections
from taid_jax.data.prepare import PrepareOptions, prepare
from taid_jax.errors import InputError, refuse
from taid_jax.models.files.tokenizer import load_tokenizer
from taid_jax.settings import ModelSettings


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags.

    Attributes:
        data: File or folder; made-up conversations of UltraChat's lengths, from words
            of Python's documentation, when empty.
        tokenizer: Model whose tokenizer is used.
        seq_len: Tokens of a row.
        batch_size: Rows of a batch.
        train_on_prompts: Count every token.
        conversations: How many are made up.
        cores: Cores that the process keeps to.
        repeats: Runs, of which the fastest counts.
    """

    data: str = ""
    tokenizer: str = ModelSettings().teachers[0]
    seq_len: int = 2048
    batch_size: int = 8
    train_on_prompts: bool = False
    conversations: int = 1000
    cores: int = 1
    repeats: int = 3


def make_conversations(path: pathlib.Path, count: int) -> None:
    """Writes conversations of about 1,100 tokens, as UltraChat's are."""
    draw = np.random.default_rng(0)
    words = " ".join(text for _, text in pydoc_sections()).split(" ")
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = int(draw.integers(1, 5))
            # Two tokens a word in this text, about.
            size = draw.lognormal(np.log(1000), 0.45) / 2 / turns
            messages = []
            for _ in range(turns):
                for role, share in (("user", 0.2), ("assistant", 0.8)):
                    start = int(draw.integers(0, len(words) // 2))
                    stop = start + max(2, int(size * share))
                    text = " ".join(words[start:stop]).strip() or "Why?"
                    messages.append({"role": role, "content": text})
            record = {"prompt_id": str(number), "messages": messages}
            file.write(json.dumps(record) + "\n")


def fastest(run: Callable[[], int], repeats: int) -> tuple[int, float]:
    """Returns what a run gives, and the computed seconds of the fastest."""
    found, best = 0, float("inf")
    for _ in range(repeats):
        start = time.process_time()
        found = run()
        best = min(best, time.process_time() - start)
    return found, best


def tokens_of(dataset: Dataset) -> int:
    """Returns the tokens of both sides, padding left out."""
    return dataset.info.train.tokens + dataset.info.held_out.tokens


def measure(command: Command, folder: pathlib.Path) -> None:
    """Prints the figures.

    Raises:
        DataError: If the data cannot be used.
        ModelError: If the tokenizer cannot.
    """
    tokenizer = cast(Tokenizer, load_tokenizer(command.tokenizer))
    source = command.data
    if not source:
        source = str(folder / "made_up.jsonl")
        make_conversations(pathlib.Path(source), command.conversations)
    shards = str(folder / "shards")
    options = {
        "seq_len": command.seq_len,
        "train_on_prompts": command.train_on_prompts,
        "bad_records": "count",
    }

    def show(what: str, tokens: int, seconds: float) -> None:
        print(f"{what:34} {tokens / seconds:12,.0f} tokens per CPU second", flush=True)

    def load(path: str, **layout: object) -> Dataset:
        return load_dataset(path, tokenizer, **options, **layout)  # pyright: ignore

    show("raw files, read and encoded", *fastest(lambda: tokens_of(load(source)), 2))

    def written() -> int:
        target = tempfile.mkdtemp(dir=folder)
        asked = PrepareOptions(
            source,
            target,
            max_tokens=command.seq_len,
            train_on_prompts=command.train_on_prompts,
            jobs=1,
        )
        manifest = prepare(asked, tokenizer)
        pathlib.Path(shards).unlink(missing_ok=True)
        pathlib.Path(shards).symlink_to(target)
        return sum(file.tokens for file in manifest.files)

    show("raw files to shards", *fastest(written, 1))
    show("shards, read", *fastest(lambda: tokens_of(load(shards)), command.repeats))
    half = command.seq_len // 2
    for name, layout in {
        "batches, packed": {"pack": True},
        "batches, padded": {"pack": False},
        f"batches, buckets {half // 2},{half}": {
            "pack": False,
            "buckets": (half // 2, half),
        },
    }.items():
        dataset = load(shards, **layout)
        batches = train_iterator(dataset.train, command.batch_size, seed=0, prefetch=0)

        def drawn(batches=batches) -> int:
            mask = ("segment_ids", "attention_mask")
            found = 0
            for _ in range(100):
                batch = next(batches)
                key = mask[0] if mask[0] in batch else mask[1]
                found += int(np.count_nonzero(batch[key]))
            return found

        show(name, *fastest(drawn, command.repeats))
        print(f"{'':34} {dataset.info.train.fill:12.1%} of the slots used")


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    command = tyro.cli(Command, args=arguments, description=__doc__)
    if hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))[: command.cores]
        os.sched_setaffinity(0, mine)
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if len(mine) > 1 else "false"
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(command, pathlib.Path(folder))
    except InputError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
