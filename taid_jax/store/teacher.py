"""A stored teacher as the train step takes any, and its folder in the store."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from taid_jax.loss import TopK, TopKHead
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import head
from taid_jax.models.families import write_config
from taid_jax.models.files.hf import CONFIG, GENERATION_CONFIG
from taid_jax.models.files.load import LoadedModel
from taid_jax.models.files.tokenizer import save_tokenizer, special_ids
from taid_jax.store.format import LOGPROB_STEP, TEACHER, Kind
from taid_jax.types import Batch, ModelFunctions, Params


def head_params(params: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Returns of a model's parameters (or of a tree like them) what its head needs."""
    name = "embed" if config.tie_embeddings else "lm_head"
    return {name: params[name]}


def stored_functions(
    kind: Kind,
    config: DecoderConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    tail: Literal["student", "uniform"] = "student",
    draws: int | None = None,
) -> ModelFunctions:
    """Returns the functions of a teacher whose outputs come with the batch.

    Args:
        kind: Of the store.
        config: The teacher's architecture.
        dtype: Of the hidden states, as a live teacher would compute in.
        tail: How the rest of the probability is spread, of a store of the most probable
            ids.
        draws: Of a token, where ids were drawn.
    """
    if kind == "hidden":

        def hidden(params: Params, batch: Batch) -> Array:
            return jnp.asarray(batch["teacher_hidden"]).astype(dtype)

        return ModelFunctions(hidden, lambda params: head(params, config))

    def most_probable(params: Params, batch: Batch) -> TopK:
        ids, logprobs, rest = (
            jnp.asarray(batch[f"teacher_{name}"]).astype(kind)
            for name, kind in (
                ("ids", jnp.int32),
                ("logprobs", jnp.float32),
                ("tail", jnp.float32),
            )
        )
        step = -LOGPROB_STEP
        return TopK(ids, logprobs * step, jnp.squeeze(rest, -1) * step)

    def drawn(params: Params, batch: Batch) -> TopK:
        counts = jnp.asarray(batch["teacher_counts"]).astype(jnp.float32)
        ids = jnp.asarray(batch["teacher_ids"]).astype(jnp.int32)
        logprobs = jnp.log(counts) - jnp.log(jnp.float32(draws or 1))
        return TopK(ids, logprobs, jnp.full(ids.shape[:-1], -jnp.inf))

    rows, rest = (most_probable, tail) if kind == "topk" else (drawn, "none")
    return ModelFunctions(rows, lambda params: TopKHead(config.vocab_size, rest))


def write_teacher_folder(folder: pathlib.Path, teacher: LoadedModel) -> None:
    """Writes config, generation settings and tokenizer of a teacher into a store."""
    place, tokenizer = folder / TEACHER, teacher.tokenizer
    if place.is_dir():
        return
    work = folder / f"{TEACHER}.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    ids = special_ids(tokenizer) if tokenizer is not None else {}
    values = {CONFIG: {**write_config(teacher.config), **ids}}
    values[GENERATION_CONFIG] = dict(teacher.generation)
    for name, value in values.items():
        (work / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        save_tokenizer(tokenizer, work)
    work.rename(place)
