"""The front door: a source of any kind to a model, and a model to a folder."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import init_params
from taid_jax.models.families import family_named, read_config
from taid_jax.models.families.fields import read_json
from taid_jax.models.files.entries import FileFormat
from taid_jax.models.files.export import MAX_SHARD_BYTES, write_folder
from taid_jax.models.files.gguf import GgufFile, open_gguf
from taid_jax.models.files.gguf_config import read_gguf_config
from taid_jax.models.files.gguf_tokenizer import read_generation
from taid_jax.models.files.hf import (
    CONFIG,
    GENERATION_CONFIG,
    has_weights,
    open_folder,
    read_folder_config,
)
from taid_jax.models.files.hub import Source, resolve
from taid_jax.models.files.tokenizer import Tokenizer, find_tokenizer, gguf_tokenizer
from taid_jax.models.files.vocabulary import count_tokens, with_tokenizer
from taid_jax.models.files.weights import (
    Shardings,
    Tensors,
    load_params,
    own_head,
    shardings_for,
)
from taid_jax.models.memory import check_fits, params_need

_MOST_NAMED = 10


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that was read.

    Attributes:
        config: The architecture; what its vocabulary has beyond the tokenizer's ids is
            marked as padding.
        params: The parameters: a nested dict of arrays, layers stacked on axis 0.
        tokenizer: Its tokenizer; None when its folder has none.
        source: What the user called it.
        generation: What its generation_config.json says, or its GGUF file; empty when
            that is nothing.
        notes: What a user should know of how it was read, a line each.
    """

    config: DecoderConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    source: str
    generation: Mapping[str, object] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_config(
    source: str | os.PathLike[str],
    *,
    weights: bool = True,
    allow_unknown_keys: bool = False,
) -> DecoderConfig:
    """Returns the architecture of a model, without its weights.

    Args:
        source: See `source.resolve`.
        weights: Follow the files of the weights, where they are on this machine: a
            head that differs from the embedding is one though the config ties them.
        allow_unknown_keys: As in `load_model`.

    Raises:
        ModelError: If there is no such model, or the decoder cannot be it.
    """
    found = resolve(source, weights=False)
    unknown = [] if allow_unknown_keys else None
    if weights and (found.kind == "gguf" or has_weights(_folder(found))):
        return _open(found, unknown).config
    return _read_config(found, unknown)


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    allow_unknown_keys: bool = False,
) -> LoadedModel:
    """Returns a model with the weights that its source holds.

    The files have the last word: where the config ties head and embedding and the files
    have two that differ, the model is untied, as in transformers.

    Args:
        source: See `source.resolve`.
        dtype: Of the parameters, whatever the files have.
        shardings: Where the parameters go: one `jax.sharding.Sharding` for all, a tree
            like the parameters, or a function from the config to that tree. Each
            device's part is read straight from the files. The default device when None.
        allow_unknown_keys: Pass over settings and tensors that the decoder does not
            know; `notes` names them. They are refused otherwise.

    Raises:
        ModelError: If there is no such model, it is damaged, the decoder cannot be it,
            its tensors are not those of its config, or they do not fit in memory.
    """
    found = resolve(source)
    unknown = [] if allow_unknown_keys else None
    config, file_format, tensors, notes = _open(found, unknown)
    params = load_params(
        config,
        file_format,
        tensors,
        dtype=dtype,
        shardings=shardings,
        unknown=unknown,
    )
    notes = [*notes, *_passed_over(unknown)]
    if isinstance(tensors, GgufFile):
        tokenizer = gguf_tokenizer(tensors.metadata, tensors.origin)
        said = read_generation(tensors.metadata)
        return _loaded(found, config, params, tokenizer, notes, said)
    return _loaded(found, config, params, find_tokenizer(found), notes)


def random_init(
    source: str | os.PathLike[str],
    rng: Array,
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    allow_unknown_keys: bool = False,
) -> LoadedModel:
    """Returns a model with random weights, of the architecture that its source names.

    The only way to a model without weights: `load_model` never makes them up.

    Args:
        source: See `source.resolve`; a folder or a config.json without weights will do.
        rng: A key of `jax.random`.
        dtype: Of the parameters.
        shardings: As in `load_model`; the parameters are created where they belong.
        allow_unknown_keys: As in `load_model`.

    Raises:
        ModelError: If there is no such config, the decoder cannot be it, or it does not
            fit in memory.
    """
    found = resolve(source, weights=False)
    unknown = [] if allow_unknown_keys else None
    config = _read_config(found, unknown)
    where = shardings_for(config, shardings)
    check_fits(params_need(found.name, config, dtype, where))
    init = jax.jit(
        functools.partial(init_params, config, dtype=dtype), out_shardings=where
    )
    tokenizer, notes = find_tokenizer(found), _passed_over(unknown)
    return _loaded(found, config, init(rng), tokenizer, notes)


def export_model(
    folder: str | os.PathLike[str],
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    *,
    generation: Mapping[str, object] | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Writes a model as a Hugging Face folder; see `export.write_folder`."""
    write_folder(
        pathlib.Path(folder).expanduser(),
        config,
        params,
        tokenizer,
        generation=generation,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        replace=replace,
    )


def _folder(found: Source) -> pathlib.Path:
    return found.path.parent if found.kind == "config" else found.path


def _read_config(found: Source, unknown: list[str] | None) -> DecoderConfig:
    if found.kind == "gguf":
        return read_gguf_config(open_gguf(found.path), unknown)
    if found.kind == "config":
        return read_config(read_json(found.path), str(found.path), unknown=unknown)
    return read_folder_config(found.path, unknown)


class _Opened(NamedTuple):
    """A model whose settings were read, and its tensors, of which none was read."""

    config: DecoderConfig
    file_format: FileFormat
    tensors: Tensors
    notes: list[str]


def _open(found: Source, unknown: list[str] | None) -> _Opened:
    if found.kind == "gguf":
        file = open_gguf(found.path)
        return _Opened(read_gguf_config(file, unknown), "gguf", file, [])
    config = _read_config(found, unknown)
    tensors = open_folder(_folder(found), family_named(config.family))
    followed, notes = own_head(config, "hf", tensors), list(tensors.notes)
    if followed != config:
        notes.append(
            "tie_word_embeddings is true, and the files have a head that differs from "
            "the embedding: the model is taken as untied, as transformers does"
        )
    return _Opened(followed, "hf", tensors, notes)


def _passed_over(unknown: list[str] | None) -> list[str]:
    """Returns the line that names what nobody knows, if there is anything."""
    if not unknown:
        return []
    named = ", ".join(unknown[:_MOST_NAMED]) + ", ..." * (len(unknown) > _MOST_NAMED)
    return [f"{len(unknown)} unknown settings or tensors left out: {named}"]


def _read_generation(folder: pathlib.Path) -> dict[str, object]:
    """Returns a folder's settings of generation, as transformers takes them.

    Older folders have what ends an answer in config.json.
    """
    if os.path.lexists(folder / GENERATION_CONFIG):
        return read_json(folder / GENERATION_CONFIG)
    if not os.path.lexists(folder / CONFIG):
        return {}
    ends = read_json(folder / CONFIG).get("eos_token_id")
    return {} if ends is None else {"eos_token_id": ends}


def _loaded(
    found: Source,
    config: DecoderConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer | None,
    notes: list[str],
    generation: Mapping[str, object] | None = None,
) -> LoadedModel:
    if generation is None:
        generation = _read_generation(_folder(found))
    # A tokenizer with more ids than embeddings is the business of whoever uses it.
    if tokenizer is not None and count_tokens(tokenizer) <= config.padded_vocab_size:
        config = with_tokenizer(config, tokenizer)
    return LoadedModel(config, params, tokenizer, found.name, generation, tuple(notes))
