"""Answers to prompts: most probable, or drawn."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Int, Key

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoding import (
    NOT_A_TOKEN,
    Answers,
    Prepared,
    decode,
    turned_layers,
)
from taid_jax.models.sampling import GREEDY, Sampling, row_keys
from taid_jax.types import Params


def prepare(
    params: Params, config: DecoderConfig, *, unroll: bool | None = None
) -> Prepared:
    """Returns parameters for several calls of `answer`, laid out once for all.

    Args:
        params: Parameters of the decoder.
        config: Its architecture.
        unroll: Lay the layers out one after the other, with a copy of their weights as
            a CPU reads them best: about twice the tokens per second there, but
            compilation grows with the layers. On a CPU when None.
    """
    if unroll is None:
        unroll = jax.default_backend() == "cpu"
    return Prepared(params, turned_layers(params, config) if unroll else None)


def generate(
    params: Params | Prepared,
    config: DecoderConfig,
    input_ids: Int[Array, "batch length"],
    attention_mask: Int[Array, "batch length"],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    sampling: Sampling = GREEDY,
    key: Key[Array, "*rows"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Int[Array, "batch max_new_tokens"]:
    """Returns the tokens of `answer`, with the same arguments."""
    return answer(
        params,
        config,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        sampling=sampling,
        key=key,
        dtype=dtype,
    ).tokens


def answer(
    params: Params | Prepared,
    config: DecoderConfig,
    input_ids: Int[Array, "batch length"],
    attention_mask: Int[Array, "batch length"],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    sampling: Sampling = GREEDY,
    key: Key[Array, "*rows"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Answers:
    """Returns how the model goes on from each prompt, by default most probably.

    Stops when every row has ended. Compiled once per shape of the prompts and setting
    of `sampling`. What is drawn for a row depends on its key and its prompt, not on
    the rows beside it or on how wide its padding is.

    Args:
        params: Parameters of the decoder, or what `prepare` made of them: with that,
            every call after the first is spared the work.
        config: Its architecture.
        input_ids: Prompts, padded on the left.
        attention_mask: 0 at padding, 1 elsewhere.
        max_new_tokens: Tokens to give at most.
        eos_token_ids: Tokens that end a row; the one that ended it is given too.
        pad_token_id: Fills a row behind its end.
        sampling: How the next token is taken; the most probable one by default.
        key: Of `jax.random`, or one for each row; needed when tokens are drawn.
        dtype: Of the computation.

    Raises:
        ModelError: If prompt and answer exceed the model's context, a prompt does not
            end with a token, tokens are to be drawn and there is no key, or the logits
            are not finite; of that, traced code sees `NOT_A_TOKEN` alone.
    """
    length = input_ids.shape[1]
    if max_new_tokens < 1 or length + max_new_tokens > config.max_position_embeddings:
        raise ModelError(
            f"generate: a prompt of {length} tokens and {max_new_tokens} new ones "
            "(need at least 1) do not fit the model's context of "
            f"{config.max_position_embeddings}; give a shorter prompt or ask for fewer "
            "tokens"
        )
    traced = isinstance(attention_mask, Tracer)
    if not traced and not bool((attention_mask[:, -1] != 0).all()):
        raise ModelError(
            "generate: the last position of every prompt has to be a token; pad on the "
            "left, and give no empty prompt"
        )
    if sampling.temperature and key is None:
        raise ModelError("generate: tokens that are drawn need a random key")
    answers = decode(
        params if isinstance(params, Prepared) else prepare(params, config),
        config,
        input_ids.astype(jnp.int32),
        attention_mask.astype(jnp.int32),
        row_keys(key, len(input_ids)) if key is not None else None,
        max_new_tokens=max_new_tokens,
        eos_token_ids=tuple(eos_token_ids),
        pad_token_id=pad_token_id,
        sampling=sampling,
        dtype=jnp.dtype(dtype),
    )
    if not isinstance(answers.tokens, Tracer):
        refuse_nonfinite(answers.tokens)
    return answers


def refuse_nonfinite(tokens: Int[ArrayLike, "batch new"]) -> None:
    """Raises if an answer could not go on because the logits were not finite.

    Raises:
        ModelError: With how many of the answers.
    """
    broken = np.any(np.asarray(tokens) == NOT_A_TOKEN, axis=-1)
    if broken.any():
        raise ModelError(
            "generate: the model's logits are not finite (NaN or infinite) in "
            f"{broken.sum()} of {broken.size} answers, so that no token is best; its "
            "weights are damaged, or too large for the dtype of the computation"
        )
