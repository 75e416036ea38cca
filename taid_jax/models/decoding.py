"""The compiled program of answers: a prompt read at once, then token by token."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Key

from taid_jax.models.attention import (
    Scoring,
    batch_positions,
    batch_segments,
    causal_attention,
    key_scores,
    scoring_of,
)
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import Pattern, head, layer_pattern, merge
from taid_jax.models.layers import Layer
from taid_jax.models.rope import longest_short
from taid_jax.models.sampling import Sampling, draw, first_greatest
from taid_jax.types import Params

Cache = tuple[Array, Array]
"""Keys and values of a layer, `(batch, kv_heads, slots, head_dim)` each."""


NOT_A_TOKEN = -(2**31)
"""Stands where a token was to be chosen and the greatest logit was not finite. Not -1,
which a caller may pad with."""


class Prepared(NamedTuple):
    """Parameters as answers read them.

    Attributes:
        params: As `init_params` gives them.
        layers: Each by itself, its kernels as a CPU reads them best for few rows; None
            where answers scan along the stacked layers.
    """

    params: Params
    layers: list[Layer] | None


class Answers(NamedTuple):
    """What was generated.

    Attributes:
        tokens: `(batch, max_new_tokens)` int32; padding behind a row's end. A row ends
            with `NOT_A_TOKEN` where its logits were no numbers.
        lengths: `(batch,)` int32, tokens of each row, the one that ended it included.
        steps: int32 scalar, tokens of the longest row: no more were computed.
    """

    tokens: Int[Array, "batch max_new_tokens"]
    lengths: Int[Array, " batch"]
    steps: Int[Array, ""]


class _State(NamedTuple):
    step: Int[Array, ""]  # tokens given so far
    tokens: Int[Array, "batch max_new"]  # padding from `step` on
    lengths: Int[Array, " batch"]  # tokens of each row so far
    done: Bool[Array, " batch"]  # rows that have ended
    caches: Any  # of every layer: a stacked one, or a list


@functools.partial(jax.jit, static_argnames="config")
def turned_layers(params: Params, config: DecoderConfig) -> list[Layer]:
    """Returns the layers of `Prepared`."""
    layer_graph = merge(params, config)[1]
    layers = []
    for part in _apart(params["layers"], config.num_layers):
        layer = nnx.merge(layer_graph, part)
        layer.attention.turn()
        layer.mlp.turn()
        layers.append(layer)
    return layers


@functools.partial(
    jax.jit,
    static_argnames=(
        "config",
        "max_new_tokens",
        "eos_token_ids",
        "pad_token_id",
        "sampling",
        "dtype",
    ),
)
def decode(
    prepared: Prepared,
    config: DecoderConfig,
    input_ids: Int[Array, "batch length"],
    attention_mask: Int[Array, "batch length"],
    keys: Key[Array, " batch"] | None,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
    sampling: Sampling,
    dtype: DTypeLike,
) -> Answers:
    """Returns the answers to prompts that `generate.answer` has looked at.

    Args:
        prepared: Parameters of the decoder.
        config: Its architecture.
        input_ids: Prompts, padded on the left.
        attention_mask: 0 at padding, 1 elsewhere.
        keys: Of every row; None when tokens are not drawn.
        max_new_tokens: Tokens to give at most.
        eos_token_ids: Tokens that end a row.
        pad_token_id: Fills a row behind its end.
        sampling: How a token is chosen.
        dtype: Of the computation.
    """
    params, layers = prepared
    batch, length = input_ids.shape
    decoder, layer_graph = merge(params, config)
    scoring = scoring_of(config)

    def choose(x: Array, step: Int[Array, ""]) -> Int[Array, " batch"]:
        logits = head(params, config).logits(decoder.final_norm(x)[:, -1])
        if not sampling.temperature or keys is None:
            token = first_greatest(logits)
        else:
            turn_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
            token = draw(logits, turn_keys, sampling)
        # NaN if any of them is: the most probable token of nothing would be token 0.
        sound = jnp.isfinite(logits.max(axis=-1))
        return jnp.where(sound, token, jnp.int32(NOT_A_TOKEN))

    def read(ids: Array, mask: Array, new: int) -> tuple[Array, Any]:
        """Returns what follows the last layer, and caches with room for new tokens."""
        given = {"input_ids": ids, "attention_mask": mask}
        positions, segments = batch_positions(given), batch_segments(given)
        pattern, turns = layer_pattern(positions, config, ids.shape[1])
        room = ((0, 0), (0, 0), (0, new), (0, 0))

        def read_layer(x: Array, part: tuple[Params, Pattern]) -> tuple[Array, Cache]:
            layer, own = part

            def attend(queries: Array, keys: Array, values: Array):
                attended = causal_attention(
                    queries,
                    keys,
                    values,
                    segments,
                    window=own.window_of(config),
                    scoring=scoring,
                )
                return attended, (jnp.pad(keys, room), jnp.pad(values, room))

            return nnx.merge(layer_graph, layer)(x, own.turn_of(turns), attend)

        x = decoder.stream(ids, positions, dtype)
        x, caches = jax.lax.scan(read_layer, x, (params["layers"], pattern))
        return x, caches if layers is None else _apart(caches, config.num_layers)

    x, caches = read(input_ids, attention_mask, max_new_tokens)
    # Where the next token of the longest row stands when it is the first new one.
    ahead = attention_mask.sum(axis=1, dtype=jnp.int32)[:, None]
    slots = length + max_new_tokens
    pattern, _ = layer_pattern(ahead, config, slots)
    first = choose(x, jnp.int32(0))
    filled = jnp.pad(attention_mask, ((0, 0), (0, max_new_tokens)), constant_values=1)
    longest = longest_short(config)
    may_lengthen = longest is not None and longest < slots

    def reread(tokens: Array) -> Any:
        # Slots that are still empty hold padding, which no token before them sees.
        return read(jnp.concatenate([input_ids, tokens], axis=1), filled, 0)[1]

    def one_token(state: _State) -> _State:
        slot = length + state.step - 1
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        here = ahead + state.step - 1
        caches = state.caches
        if may_lengthen:
            # All that was read has to turn by the other factors from now on, and what
            # later layers made of it changes too. As transformers does for Phi-3.
            caches = jax.lax.cond(
                here.max() == longest, lambda: reread(state.tokens), lambda: caches
            )
        _, turns = layer_pattern(here, config, slots)
        behind = slot - jnp.arange(filled.shape[1], dtype=jnp.int32)[None]
        before = (filled != 0) & (behind >= 0)

        def one_layer(
            x: Array, layer: Layer, own: Pattern, cache: Cache
        ) -> tuple[Array, Cache]:
            window = own.window_of(config)
            visible = before if window is None else before & (behind < window)
            put = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=2
            )

            def attend(queries: Array, keys: Array, values: Array):
                cached = put(cache[0], keys), put(cache[1], values)
                return _attend(queries, *cached, visible, scoring), cached

            return layer(x, own.turn_of(turns), attend)

        def stacked_layer(
            x: Array, part: tuple[Params, Pattern, Cache]
        ) -> tuple[Array, Cache]:
            return one_layer(x, nnx.merge(layer_graph, part[0]), *part[1:])

        x = decoder.stream(token, here, dtype)
        if layers is None:
            stacked = params["layers"], pattern, caches
            x, caches = jax.lax.scan(stacked_layer, x, stacked)
        else:
            patterns = _apart(pattern, config.num_layers)
            each = list(zip(layers, patterns, caches, strict=True))
            caches = []
            for layer, own, cache in each:
                x, cache = one_layer(x, layer, own, cache)
                caches.append(cache)
        chosen = choose(x, state.step)
        token = jnp.where(state.done, jnp.int32(pad_token_id), chosen)
        return put_token(state._replace(caches=caches), token)

    def put_token(state: _State, token: Int[Array, " batch"]) -> _State:
        tokens = jax.lax.dynamic_update_slice_in_dim(
            state.tokens, token[:, None], state.step, axis=1
        )
        done = functools.reduce(
            jnp.logical_or,
            [token == end for end in (*eos_token_ids, NOT_A_TOKEN)],
            state.done,
        )
        lengths = state.lengths + (~state.done).astype(jnp.int32)
        return _State(state.step + 1, tokens, lengths, done, state.caches)

    empty = jnp.full((batch, max_new_tokens), pad_token_id, jnp.int32)
    none = jnp.zeros(batch, jnp.int32)
    start = _State(jnp.int32(0), empty, none, none != 0, caches)
    end = jax.lax.while_loop(
        lambda state: (state.step < max_new_tokens) & ~state.done.all(),
        one_token,
        put_token(start, first),
    )
    return Answers(end.tokens, end.lengths, end.step)


def _attend(
    queries: Float[Array, "batch kv_heads group 1 head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    visible: Bool[Array, "batch slots"],
    scoring: Scoring,
) -> Float[Array, "batch kv_heads group 1 head_dim"]:
    """Returns the attended values of one query per row over the filled slots."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = key_scores(queries, keys, scoring)
    scores = jnp.where(visible[:, None, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return product("bkgqm,bkmh->bkgqh", weights, values).astype(queries.dtype)


def _apart(stacked: Any, num_layers: int) -> list[Any]:
    """Returns the layers of a stacked tree, one by one."""
    return [
        jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
        for index in range(num_layers)
    ]
