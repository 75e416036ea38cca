"""A store made of Parquet files that an inference server has filled."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped
from rich.console import Console
from rich.progress import Progress

from taid_jax.errors import parsing
from taid_jax.models.files.load import LoadedModel, open_model
from taid_jax.models.files.tokenizer import digest_tokenizer, require_tokenizer
from taid_jax.models.files.vocabulary import with_tokenizer
from taid_jax.settings import SettingsError
from taid_jax.store.folder import (
    Entry,
    Sink,
    announce,
    begin_store,
    finish_store,
    tidy,
)
from taid_jax.store.format import (
    DTYPES,
    KEY_BYTES,
    Column,
    File,
    Manifest,
    StoreError,
    describe_file,
    encode_logprobs,
    example_key,
    read_manifest,
    topk_columns,
)
from taid_jax.store.parquet import Example, count_rows, read_examples
from taid_jax.store.teacher import write_teacher_folder


def import_outputs(
    files: Sequence[pathlib.Path],
    teacher: str,
    output: pathlib.Path,
    *,
    k: int,
    shard_bytes: int,
    console: Console,
    allow_unknown_keys: bool = False,
) -> Manifest:
    """Stores the most probable tokens that Parquet files give, and returns what it is.

    Each row is an example: `input_ids`, and for each of them the ids and the
    log-probabilities of what may come next, `top_ids` and `top_logprobs`. Only config
    and tokenizer of the teacher are read; as its weights are not there, the contents of
    the files stand for them in the fingerprint, so that stores of other files are
    another teacher's. An example that comes again counts once, as it came first.

    A job that was stopped begins anew, and ends in the same bytes. At most `k` entries
    of each token are stored, in files of about `shard_bytes`.

    Raises:
        StoreError: If a file cannot be used, or the disk is too small.
        SettingsError: If the output is something else, or `k` too large.
        ModelError: If the teacher cannot be used.
        WriteError: If the store cannot be written.
    """
    output = output.expanduser().absolute()
    files = [path.expanduser().absolute() for path in files]
    examples, tokens = count_rows(files)
    opened = open_model(teacher, weights=False, allow_unknown_keys=allow_unknown_keys)
    tokenizer = require_tokenizer(opened.tokenizer, opened.source)
    config = with_tokenizer(opened.config, tokenizer)
    if k > config.vocab_size:
        raise SettingsError(
            f"k: need at most {config.vocab_size}, the entries of the teacher's "
            f"vocabulary, got {k}"
        )
    columns = topk_columns(k, config.vocab_size)
    with parsing("an input cannot be read", StoreError):
        sums = [describe_file(path).sha256 for path in files]
    facts = {
        "kind": "topk",
        "columns": [dataclasses.asdict(column) for column in columns],
        "vocab_size": config.vocab_size,
        "teacher": hashlib.sha256("\n".join(sums).encode()).hexdigest(),
        "tokenizer": digest_tokenizer(tokenizer),
        "source": opened.source.name,
        "draws": None,
        "made": {
            "imported": [path.name for path in files],
            "sha256": sums,
            "shard_bytes": shard_bytes,
        },
    }
    with contextlib.ExitStack() as hold:
        if not begin_store(output, facts, hold):
            announce(output, facts, console, examples=examples, tokens=tokens)
            model = LoadedModel(
                config, {}, tokenizer, opened.source.name, opened.generation
            )
            write_teacher_folder(output, model)
            with Progress(console=console) as progress:
                rows = progress.track(
                    read_examples(files, config.vocab_size),
                    examples,
                    description="reading",
                )
                _write(output, facts, columns, rows, shard_bytes, console)
        tidy(output)
        return read_manifest(output)


def stored_columns(
    example: Example, columns: Sequence[Column]
) -> list[Shaped[np.ndarray, "tokens _"]]:
    """Returns the columns of an example: the most probable entries, these in order.

    Args:
        example: With any number of entries for each token; of more than are stored the
            most probable are taken, of equal ones those with the least ids, and what is
            lacking is filled up.
        columns: Of kind "topk".
    """
    size, k, counts = len(example.ids), columns[0].width, example.counts
    token = np.repeat(np.arange(size), counts)
    order = np.lexsort((example.top_ids, -example.top_logprobs, token))
    rank = np.arange(len(token)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = token[rank < k], rank[rank < k]
    chosen = order[rank < k]
    ids, logprobs, tail = (
        np.full((size, column.width), column.filler, DTYPES[column.dtype])
        for column in columns
    )
    kept = example.top_logprobs[chosen]
    ids[place] = example.top_ids[chosen]
    logprobs[place] = encode_logprobs(kept)
    mass = np.bincount(place[0], np.exp(kept), size)
    with np.errstate(divide="ignore"):
        tail[:, 0] = encode_logprobs(np.log1p(-np.minimum(mass, 1)))
    return [ids, logprobs, tail]


def _write(
    output: pathlib.Path,
    facts: dict[str, Any],
    columns: Sequence[Column],
    examples: Iterable[Example],
    shard_bytes: int,
    console: Console,
) -> None:
    """Writes all but the teacher's folder."""
    width = sum(column.bytes_per_token for column in columns)
    entries: list[Entry] = []
    shards: list[File] = []
    tokens, known, mass, count = 0, 0, 0.0, 0
    seen: set[bytes] = set()

    def distinct() -> Iterator[Example]:
        nonlocal count
        for example in examples:
            key = example_key(example.ids)
            if key not in seen:
                seen.add(key)
                yield example
            count += 1

    rows = distinct()
    ahead = next(rows, None)
    while ahead is not None:
        written, record = 0, 0
        path = output / f"outputs-{len(shards):05}.arrayrecord"
        with Sink(path, "topk") as sink:
            while ahead is not None and written < shard_bytes:
                sink.write(ahead.ids, stored_columns(ahead, columns))
                entries.append((example_key(ahead.ids), len(shards), record, 0))
                known += int((ahead.counts > 0).sum())
                written += len(ahead.ids) * width + KEY_BYTES
                record += 1
                ahead = next(rows, None)
        shards.append(sink.file)
        tokens += sink.tokens
        mass += sink.mass
    if again := count - len(seen):
        console.print(f"note: {again:,} examples come again, and count once")
    # On average over the tokens that something is known of.
    finish_store(output, facts, entries, shards, tokens, mass * tokens / max(1, known))
