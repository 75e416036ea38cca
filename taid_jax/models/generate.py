"""Greedy answers, with a cache of the keys and values that were already computed."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from taid_jax.models.attention import batch_positions, batch_segments, causal_attention
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import head, merge
from taid_jax.models.errors import ModelError
from taid_jax.models.layers import Layer, Linear
from taid_jax.models.rope import rotation
from taid_jax.types import Head, Params

Cache = tuple[Array, Array]
"""Keys and values of a layer, `(batch, kv_heads, slots, head_dim)` each."""


class _State(NamedTuple):
    step: Int[Array, ""]  # tokens given so far
    tokens: Int[Array, "batch max_new"]  # padding from `step` on
    done: Bool[Array, " batch"]  # rows that have ended
    caches: Any  # of every layer: a stacked one, or a list


def generate(
    params: Params,
    config: DecoderConfig,
    input_ids: Int[Array, "batch length"],
    attention_mask: Int[Array, "batch length"],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    dtype: DTypeLike = jnp.float32,
    unroll: bool | None = None,
) -> Int[Array, "batch max_new_tokens"]:
    """Returns the most probable continuation of each prompt, token by token.

    Stops when every row has ended. Compiled once per shape of the prompts.

    Args:
        params: Parameters of the decoder.
        config: Its architecture.
        input_ids: Prompts, padded on the left.
        attention_mask: 0 at padding, 1 elsewhere.
        max_new_tokens: Tokens to give at most.
        eos_token_ids: Tokens that end a row; the one that ended it is given too.
        pad_token_id: Fills a row behind its end.
        dtype: Of the computation.
        unroll: Lay the layers out one after the other, with a copy of their weights as
            a CPU reads them best: about twice the tokens per second there, but
            compilation grows with the layers. On a CPU when None.

    Raises:
        ModelError: If prompt and answer exceed the model's context, or a prompt does
            not end with a token.
    """
    length = input_ids.shape[1]
    if max_new_tokens < 1 or length + max_new_tokens > config.max_length:
        raise ModelError(
            f"generate: a prompt of {length} tokens and {max_new_tokens} new ones "
            "(need at least 1) do not fit the model's context of "
            f"{config.max_length}; give a shorter prompt or ask for fewer tokens"
        )
    traced = isinstance(attention_mask, Tracer)
    if not traced and not bool((attention_mask[:, -1] != 0).all()):
        raise ModelError(
            "generate: the last position of every prompt has to be a token; pad on the "
            "left, and give no empty prompt"
        )
    return _generate(
        params,
        config,
        input_ids.astype(jnp.int32),
        attention_mask.astype(jnp.int32),
        max_new_tokens=max_new_tokens,
        eos_token_ids=tuple(eos_token_ids),
        pad_token_id=pad_token_id,
        dtype=jnp.dtype(dtype),
        unroll=jax.default_backend() == "cpu" if unroll is None else unroll,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "config",
        "max_new_tokens",
        "eos_token_ids",
        "pad_token_id",
        "dtype",
        "unroll",
    ),
)
def _generate(
    params: Params,
    config: DecoderConfig,
    input_ids: Int[Array, "batch length"],
    attention_mask: Int[Array, "batch length"],
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
    dtype: DTypeLike,
    unroll: bool,
) -> Int[Array, "batch max_new_tokens"]:
    batch, length = input_ids.shape
    decoder, layer_graph = merge(params, config)
    prompt = {"input_ids": input_ids, "attention_mask": attention_mask}
    positions, segments = batch_positions(prompt), batch_segments(prompt)
    room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0))

    def choose(x: Array) -> Int[Array, " batch"]:
        # The head is made where it is used: a transposed table that comes from outside
        # the loop would be copied into it.
        return _most_probable(decoder.final_norm(x)[:, -1], head(params, config))

    def read_layer(x: Array, layer: Params) -> tuple[Array, Cache]:
        def attend(queries: Array, keys: Array, values: Array) -> tuple[Array, Cache]:
            attended = causal_attention(queries, keys, values, segments)
            return attended, (jnp.pad(keys, room), jnp.pad(values, room))

        turn = rotation(positions, config.rope, config.head_dim)
        return nnx.merge(layer_graph, layer)(x, turn, attend)

    embedded = decoder.embed(input_ids, dtype)
    x, caches = jax.lax.scan(read_layer, embedded, params["layers"])
    first = choose(x)
    layers: list[Layer] = []
    if unroll:
        apart = _apart(params["layers"], config.num_layers)
        layers = [_turned(nnx.merge(layer_graph, layer)) for layer in apart]
        caches = _apart(caches, config.num_layers)
    filled = jnp.pad(attention_mask, ((0, 0), (0, max_new_tokens)), constant_values=1)

    def one_token(state: _State) -> _State:
        slot = length + state.step - 1
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        turn = rotation(positions[:, -1:] + state.step, config.rope, config.head_dim)
        visible = (filled != 0) & (jnp.arange(filled.shape[1])[None] <= slot)

        def one_layer(x: Array, layer: Layer, cache: Cache) -> tuple[Array, Cache]:
            put = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=2
            )

            def attend(queries: Array, keys: Array, values: Array):
                cached = put(cache[0], keys), put(cache[1], values)
                return _attend(queries, *cached, visible), cached

            return layer(x, turn, attend)

        def stacked_layer(x: Array, part: tuple[Params, Cache]) -> tuple[Array, Cache]:
            return one_layer(x, nnx.merge(layer_graph, part[0]), part[1])

        x = decoder.embed(token, dtype)
        if unroll:
            caches = []
            for layer, cache in zip(layers, state.caches, strict=True):
                x, cache = one_layer(x, layer, cache)
                caches.append(cache)
        else:
            stacked = params["layers"], state.caches
            x, caches = jax.lax.scan(stacked_layer, x, stacked)
        token = jnp.where(state.done, jnp.int32(pad_token_id), choose(x))
        return put_token(state._replace(caches=caches), token)

    def put_token(state: _State, token: Int[Array, " batch"]) -> _State:
        tokens = jax.lax.dynamic_update_slice_in_dim(
            state.tokens, token[:, None], state.step, axis=1
        )
        done = functools.reduce(
            jnp.logical_or, [token == end for end in eos_token_ids], state.done
        )
        return _State(state.step + 1, tokens, done, state.caches)

    empty = jnp.full((batch, max_new_tokens), pad_token_id, jnp.int32)
    start = _State(jnp.int32(0), empty, jnp.zeros(batch, bool), caches)
    return jax.lax.while_loop(
        lambda state: (state.step < max_new_tokens) & ~state.done.all(),
        one_token,
        put_token(start, first),
    ).tokens


def _most_probable(
    hidden: Float[Array, "batch d_model"], last: Head
) -> Int[Array, " batch"]:
    """Returns the first id of the greatest logit."""
    logits = last.logits(hidden)
    # Two plain reductions; argmax's reduction of pairs is much slower on a CPU.
    greatest = logits.max(axis=-1, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(logits == greatest, ids, logits.shape[-1] - 1).min(axis=-1)


def _attend(
    queries: Float[Array, "batch kv_heads group 1 head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    visible: Bool[Array, "batch slots"],
) -> Float[Array, "batch kv_heads group 1 head_dim"]:
    """Returns the attended values of one query per row over the filled slots."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("bkgqh,bkmh->bkgqm", queries, keys)
    scores *= 1 / math.sqrt(queries.shape[-1])
    scores = jnp.where(visible[:, None, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return product("bkgqm,bkmh->bkgqh", weights, values).astype(queries.dtype)


def _apart(stacked: Any, num_layers: int) -> list[Any]:
    """Returns the layers of a stacked tree, one by one."""
    return [
        jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
        for index in range(num_layers)
    ]


def _turned(layer: Layer) -> Layer:
    """Returns the layer with its kernels laid out for few rows."""
    for _, module in nnx.iter_modules(layer):
        if isinstance(module, Linear):
            module.turn()
    return layer
