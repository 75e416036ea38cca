"""A source of any kind to a model, and a model to a folder.

`open_model` reads everything but the weights; what it gives is handed on.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import init_params
from taid_jax.models.families import family_named
from taid_jax.models.families.fields import read_json
from taid_jax.models.files.export import export_model as export_model
from taid_jax.models.files.gguf import GgufFile, open_gguf
from taid_jax.models.files.gguf_config import read_gguf_config
from taid_jax.models.files.gguf_tokenizer import read_generation
from taid_jax.models.files.hf import (
    ADAPTER,
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


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model of which everything was read but the weights.

    Attributes:
        source: Where it lies.
        config: The architecture, as the files of the weights have it where they are on
            this machine: a head that differs from the embedding is one though the
            config ties them.
        tensors: The weights; None where they are not on this machine.
        notes: What a user should know of how it was read, a line each.
        unknown: The settings that were passed over; None where they are refused.
    """

    source: Source
    config: DecoderConfig
    tensors: Tensors | None
    notes: tuple[str, ...]
    unknown: tuple[str, ...] | None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None when it has none."""
        if isinstance(self.tensors, GgufFile):
            return gguf_tokenizer(self.tensors.metadata, self.tensors.origin)
        return find_tokenizer(self.source)

    @functools.cached_property
    def generation(self) -> Mapping[str, object]:
        """What the model says of generation, as transformers takes it."""
        if isinstance(self.tensors, GgufFile):
            return read_generation(self.tensors.metadata)
        folder = self.source.folder
        if os.path.lexists(folder / GENERATION_CONFIG):
            return read_json(folder / GENERATION_CONFIG)
        # Older folders have what ends an answer in config.json.
        has_config = os.path.lexists(folder / CONFIG)
        ends = read_json(folder / CONFIG).get("eos_token_id") if has_config else None
        return {} if ends is None else {"eos_token_id": ends}

    def load(
        self, *, dtype: DTypeLike = jnp.float32, shardings: Shardings | None = None
    ) -> LoadedModel:
        """Returns the model with its weights; see `load_model`."""
        if self.tensors is None:
            allow = self.unknown is not None
            found = open_model(self.source.name, weights=True, allow_unknown_keys=allow)
            return found.load(dtype=dtype, shardings=shardings)
        unknown = None if self.unknown is None else list(self.unknown)
        params = load_params(
            self.config, self.tensors, dtype=dtype, shardings=shardings, unknown=unknown
        )
        return self._loaded(params, unknown)

    def without_weights(self) -> LoadedModel:
        """Returns the model with no parameters."""
        return self._loaded({}, self.unknown)

    def random_init(
        self,
        rng: Array,
        *,
        dtype: DTypeLike = jnp.float32,
        shardings: Shardings | None = None,
    ) -> LoadedModel:
        """Returns the model with random weights; see the function `random_init`."""
        where = shardings_for(self.config, shardings)
        check_fits(params_need(self.source.name, self.config, dtype, where))
        init = functools.partial(init_params, self.config, dtype=dtype)
        return self._loaded(jax.jit(init, out_shardings=where)(rng), self.unknown)

    def _loaded(self, params: dict[str, Any], unknown: Any) -> LoadedModel:
        config, tokenizer, notes = self.config, self.tokenizer, self.notes
        # A tokenizer with more ids than embeddings is the business of whoever uses it.
        if tokenizer and count_tokens(tokenizer) <= config.padded_vocab_size:
            config = with_tokenizer(config, tokenizer)
        if unknown:
            more = ", ..." * (len(unknown) > _MOST_NAMED)
            named = ", ".join(unknown[:_MOST_NAMED]) + more
            left_out = f"{len(unknown)} unknown settings or tensors left out: {named}"
            notes = (*notes, left_out)
        name, generation = self.source.name, self.generation
        return LoadedModel(config, params, tokenizer, name, generation, notes)


def open_model(
    source: str | os.PathLike[str],
    *,
    weights: bool | None = None,
    allow_unknown_keys: bool = False,
) -> OpenModel:
    """Returns a model after reading everything but its weights.

    Args:
        source: See `hub.resolve`.
        weights: They have to be there (and are fetched from the Hub); or are not looked
            at when False; or are opened where they are on this machine when None.
        allow_unknown_keys: As in `load_model`.

    Raises:
        ModelError: If there is no such model, or the decoder cannot be it.
    """
    found = resolve(source, weights=weights or False)
    unknown = [] if allow_unknown_keys else None
    notes: list[str] = []
    tensors: Tensors | None = None
    if found.kind == "gguf":
        tensors = file = open_gguf(found.path)
        config = read_gguf_config(file, unknown)
    else:
        config = read_folder_config(found.path, unknown)
        if weights or (weights is None and has_weights(found.folder)):
            tensors = files = open_folder(found.folder, family_named(config.family))
            followed = own_head(config, files)
            notes += files.notes
            if followed != config:
                notes.append(
                    "tie_word_embeddings is true, and the files have a head that "
                    "differs from the embedding: the model is taken as untied, as "
                    "transformers does"
                )
            config = followed
            if os.path.isfile(found.folder / ADAPTER):
                notes.append(
                    f"{found.folder} has an adapter beside the weights, which is left "
                    "out: merge it first (`merge_and_unload` in peft) if it belongs "
                    "to the model"
                )
    passed = None if unknown is None else tuple(unknown)
    return OpenModel(found, config, tensors, tuple(notes), passed)


def load_config(
    source: str | os.PathLike[str], *, allow_unknown_keys: bool = False
) -> DecoderConfig:
    """Returns the architecture of a model, without its weights.

    Where the files of the weights are on this machine, they are followed: a head that
    differs from the embedding is one though the config ties them.

    Args:
        source: See `hub.resolve`.
        allow_unknown_keys: As in `load_model`.

    Raises:
        ModelError: If there is no such model, or the decoder cannot be it.
    """
    return open_model(source, allow_unknown_keys=allow_unknown_keys).config


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
        source: See `hub.resolve`.
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
    found = open_model(source, weights=True, allow_unknown_keys=allow_unknown_keys)
    return found.load(dtype=dtype, shardings=shardings)


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
        source: See `hub.resolve`; a folder or a config.json without weights will do.
        rng: A key of `jax.random`.
        dtype: Of the parameters.
        shardings: As in `load_model`; the parameters are created where they belong.
        allow_unknown_keys: As in `load_model`.

    Raises:
        ModelError: If there is no such config, the decoder cannot be it, or it does not
            fit in memory.
    """
    found = open_model(source, weights=False, allow_unknown_keys=allow_unknown_keys)
    return found.random_init(rng, dtype=dtype, shardings=shardings)
