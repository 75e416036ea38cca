"""The front door: a source of any kind to a model, and a model to a folder."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import init_params
from taid_jax.models.export import MAX_SHARD_BYTES, write_folder
from taid_jax.models.families import family_named, read_config
from taid_jax.models.fields import read_json
from taid_jax.models.gguf import open_gguf
from taid_jax.models.gguf_config import read_gguf_config
from taid_jax.models.gguf_tokenizer import read_generation
from taid_jax.models.hf import GENERATION_CONFIG, open_folder, read_folder_config
from taid_jax.models.source import Source, resolve
from taid_jax.models.tokenizer import Tokenizer, find_tokenizer, gguf_tokenizer
from taid_jax.models.vocabulary import count_tokens, with_tokenizer
from taid_jax.models.weights import Shardings, load_params, shardings_for


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
    """

    config: DecoderConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    source: str
    generation: Mapping[str, object] = dataclasses.field(default_factory=dict)


def load_config(source: str | os.PathLike[str]) -> DecoderConfig:
    """Returns the architecture of a model, without its weights.

    Args:
        source: See `source.resolve`.

    Raises:
        ModelError: If there is no such model, or the decoder cannot be it.
    """
    return _read_config(resolve(source, weights=False))


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
) -> LoadedModel:
    """Returns a model with the weights that its source holds.

    Args:
        source: See `source.resolve`.
        dtype: Of the parameters, whatever the files have.
        shardings: Where the parameters go: one `jax.sharding.Sharding` for all, a tree
            like the parameters, or a function from the config to that tree. Each
            device's part is read straight from the files. The default device when None.

    Raises:
        ModelError: If there is no such model, it is damaged, the decoder cannot be it,
            or its tensors are not those of its config (all of them listed).
    """
    found = resolve(source)
    if found.kind == "gguf":
        file = open_gguf(found.path)
        config = read_gguf_config(file)
        params = load_params(config, "gguf", file, dtype=dtype, shardings=shardings)
        tokenizer = gguf_tokenizer(file.metadata, file.origin)
        said = read_generation(file.metadata)
        return _loaded(found, config, params, tokenizer, said)
    config = _read_config(found)
    tensors = open_folder(_folder(found), family_named(config.family))
    params = load_params(config, "hf", tensors, dtype=dtype, shardings=shardings)
    return _loaded(found, config, params, find_tokenizer(found))


def random_init(
    source: str | os.PathLike[str],
    rng: Array,
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
) -> LoadedModel:
    """Returns a model with random weights, of the architecture that its source names.

    The only way to a model without weights: `load_model` never makes them up.

    Args:
        source: See `source.resolve`; a folder or a config.json without weights will do.
        rng: A key of `jax.random`.
        dtype: Of the parameters.
        shardings: As in `load_model`; the parameters are created where they belong.

    Raises:
        ModelError: If there is no such config, or the decoder cannot be it.
    """
    found = resolve(source, weights=False)
    config = _read_config(found)
    init = jax.jit(
        functools.partial(init_params, config, dtype=dtype),
        out_shardings=shardings_for(config, shardings),
    )
    return _loaded(found, config, init(rng), find_tokenizer(found))


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


def _read_config(found: Source) -> DecoderConfig:
    if found.kind == "gguf":
        return read_gguf_config(open_gguf(found.path))
    if found.kind == "config":
        return read_config(read_json(found.path), str(found.path))
    return read_folder_config(found.path)


def _loaded(
    found: Source,
    config: DecoderConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer | None,
    generation: Mapping[str, object] | None = None,
) -> LoadedModel:
    path = _folder(found) / GENERATION_CONFIG
    if generation is None:
        has_one = found.kind != "gguf" and path.is_file()
        generation = read_json(path) if has_one else {}
    # A tokenizer with more ids than embeddings is the business of whoever uses it.
    if tokenizer is not None and count_tokens(tokenizer) <= config.vocab_size:
        config = with_tokenizer(config, tokenizer)
    return LoadedModel(config, params, tokenizer, found.name, generation)
