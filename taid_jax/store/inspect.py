"""What a store has in it, for people to look at."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Shaped

from taid_jax.models.decoder import abstract_params, head
from taid_jax.models.files.load import open_model
from taid_jax.models.files.tokenizer import Tokenizer, require_tokenizer
from taid_jax.store.format import (
    LOGPROB_STEP,
    TEACHER,
    StoreError,
    fault_of,
    read_manifest,
    stored_mass,
)
from taid_jax.store.read import Store
from taid_jax.train.pair import load_stored
from taid_jax.types import Head

_SAMPLE = 256
"""Records that are read for quantiles."""

_BEST = 5

Columns = Mapping[str, Shaped[np.ndarray, "tokens _"]]
Rows = Callable[[Columns], tuple[np.ndarray, np.ndarray]]
"""Gives ids and probabilities, `(tokens, any)` each."""


def find_faults(folder: pathlib.Path) -> list[StoreError]:
    """Returns what is wrong with each file of a store, checksums among it.

    Raises:
        StoreError: If the manifest cannot be used.
    """
    folder = folder.expanduser().absolute()
    manifest = read_manifest(folder)
    files = (*manifest.shards, *manifest.others)
    faults = (fault_of(folder, file, contents=True) for file in files)
    return [StoreError(fault) for fault in faults if fault]


def mass_quantiles(store: Store, percents: Sequence[int]) -> list[float]:
    """Returns quantiles of the stored mass over tokens, of kind "topk".

    Tokens of up to 256 examples that are spread evenly are looked at; none may be
    found.
    """
    count = min(_SAMPLE, len(store))
    numbers = store.in_order()[np.arange(count) * len(store) // max(1, count)]
    filler, found = store.manifest.columns[0].filler, [np.zeros(0)]
    for number in numbers.tolist():
        columns = store.columns(number)
        known = columns["teacher_ids"][:, 0] != filler
        found.append(stored_mass(columns["teacher_tail"][known, 0]))
    values = np.concatenate(found)
    return np.percentile(values, percents).tolist() if len(values) else []


class Favourites(NamedTuple):
    """What a teacher thinks most probable."""

    example: int
    token: int
    ids: list[int]
    probabilities: list[float]


def favourites(store: Store, count: int) -> tuple[Tokenizer, list[Favourites]]:
    """Returns the teacher's tokenizer, and what it favours after the first tokens.

    What these tokens are is not stored: only a hash of each example's is.
    """
    model = open_model(store.folder / TEACHER, weights=False)
    tokenizer = require_tokenizer(model.tokenizer, model.source)
    rows = _stored_rows(store)
    if store.manifest.kind == "hidden":
        device = SingleDeviceSharding(jax.devices()[0])
        teacher = load_stored(
            store,
            model,
            "float32",
            lambda config: jax.tree.map(lambda _: device, abstract_params(config)),
        )
        rows = _computed_rows(head(teacher.params, teacher.config))
    found: list[Favourites] = []
    for example, number in enumerate(store.in_order()[:count].tolist(), start=1):
        columns = {
            name: column[: count - len(found)]
            for name, column in store.columns(number).items()
        }
        found += _sorted(example, *rows(columns), store.manifest.vocab_size)
        if len(found) >= count:
            break
    return tokenizer, found


def _computed_rows(last: Head) -> Rows:
    def rows(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        hidden = jnp.asarray(columns["teacher_hidden"]).astype(jnp.float32)
        probabilities = jax.nn.softmax(last.logits(hidden))
        found = jax.lax.top_k(probabilities, min(_BEST, probabilities.shape[-1]))
        return np.asarray(found[1]), np.asarray(found[0])

    return rows


def _stored_rows(store: Store) -> Rows:

    def rows(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        if store.manifest.kind == "topk":
            logprobs = columns["teacher_logprobs"].astype(np.float64) * -LOGPROB_STEP
            return columns["teacher_ids"], np.exp(logprobs)
        draws = store.manifest.draws or 1
        return columns["teacher_ids"], columns["teacher_counts"] / draws

    return rows


def _sorted(
    example: int, ids: np.ndarray, probabilities: np.ndarray, vocab_size: int
) -> Iterator[Favourites]:
    for token in range(len(ids)):
        order = np.argsort(-probabilities[token], kind="stable")
        real = order[ids[token][order] < vocab_size][:_BEST]
        yield Favourites(
            example,
            token + 1,
            ids[token][real].tolist(),
            probabilities[token][real].tolist(),
        )
