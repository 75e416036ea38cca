"""Completions of prompts: a prompt is read at once, then token by token."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from taid_jax.errors import ModelError
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
from taid_jax.models.prepared import Prepared, each_layer
from taid_jax.models.prepared import prepare as prepare
from taid_jax.models.rope import longest_short
from taid_jax.models.sampling import (
    GREEDY,
    SamplingParams,
    draw,
    first_greatest,
    row_keys,
)
from taid_jax.types import Params

NOT_A_TOKEN = -(2**31)
"""Stands where a token was to be chosen and the greatest logit was not finite. Not -1,
which a caller may pad with."""

Cache = tuple[Array, Array]
"""Keys and values of a layer, `(batch, kv_heads, slots, head_dim)` each."""


class Completions(NamedTuple):
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


def generate(
    params: Params | Prepared,
    config: DecoderConfig,
    input_ids: Int[Array, "batch length"],
    attention_mask: Int[Array, "batch length"],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    sampling: SamplingParams = GREEDY,
    key: Key[Array, "*rows"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Completions:
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
        ModelError: If prompt and completion exceed the model's context, a prompt does
            not end with a token, tokens are to be drawn and there is no key, or the
            logits are not finite; of that, traced code sees `NOT_A_TOKEN` alone.
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
    found = _generate(
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
    if not isinstance(found.tokens, Tracer):
        refuse_nonfinite(found.tokens)
    return found


def refuse_nonfinite(tokens: Int[ArrayLike, "batch new"]) -> None:
    """Raises if a completion could not go on because the logits were not finite.

    Raises:
        ModelError: With how many of the completions.
    """
    broken = np.any(np.asarray(tokens) == NOT_A_TOKEN, axis=-1)
    if broken.any():
        raise ModelError(
            "generate: the model's logits are not finite (NaN or infinite) in "
            f"{broken.sum()} of {broken.size} completions, so that no token is best; "
            "its weights are damaged, or too large for the dtype of the computation"
        )


class _State(NamedTuple):
    step: Int[Array, ""]  # tokens given so far
    tokens: Int[Array, "batch max_new"]  # padding from `step` on
    lengths: Int[Array, " batch"]  # tokens of each row so far
    done: Bool[Array, " batch"]  # rows that have ended
    caches: Any  # of every layer: a stacked one, or a list


@functools.partial(
    jax.jit,
    static_argnames=(
        *("config", "max_new_tokens", "eos_token_ids", "pad_token_id"),
        *("sampling", "dtype"),
    ),
)
def _generate(
    prepared: Prepared,
    config: DecoderConfig,
    input_ids: Int[Array, "batch length"],
    attention_mask: Int[Array, "batch length"],
    keys: Key[Array, " batch"] | None,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
    sampling: SamplingParams,
    dtype: DTypeLike,
) -> Completions:
    """The compiled program of `generate`; `keys` are of every row."""
    params, layers = prepared
    batch, length = input_ids.shape
    decoder, layer_graph = merge(params, config)
    scoring = scoring_of(config)

    def choose(x: Array, step: Int[Array, ""]) -> Int[Array, " batch"]:
        logits = head(params, config).logits(decoder.final_norm(x)[:, -1])
        if not sampling.temperature or keys is None:
            token = first_greatest(logits)
        else:
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
            token = draw(logits, step_keys, sampling)
        # NaN if any of them is: the most probable token of nothing would be token 0.
        sound = jnp.isfinite(logits.max(axis=-1))
        return jnp.where(sound, token, jnp.int32(NOT_A_TOKEN))

    def read(ids: Array, mask: Array, new: int) -> tuple[Array, Any]:
        """Returns what follows the last layer, and caches with room for new tokens."""
        given = {"input_ids": ids, "attention_mask": mask}
        positions, segments = batch_positions(given), batch_segments(given)
        pattern, rotations = layer_pattern(positions, config, ids.shape[1])
        room = ((0, 0), (0, 0), (0, new), (0, 0))

        def read_layer(x: Array, part: tuple[Params, Pattern]) -> tuple[Array, Cache]:
            layer, own = part

            def attend(queries: Array, keys: Array, values: Array):
                window = own.window_of(config)
                attended = causal_attention(
                    queries, keys, values, segments, window=window, scoring=scoring
                )
                return attended, (jnp.pad(keys, room), jnp.pad(values, room))

            return nnx.merge(layer_graph, layer)(x, own.rotation_of(rotations), attend)

        x = decoder.stream(ids, positions, dtype)
        x, caches = jax.lax.scan(read_layer, x, (params["layers"], pattern))
        return x, caches if layers is None else each_layer(caches, config.num_layers)

    x, caches = read(input_ids, attention_mask, max_new_tokens)
    # Where the next token of the longest row stands when it is the first new one.
    ahead = attention_mask.sum(axis=1, dtype=jnp.int32)[:, None]
    slots = length + max_new_tokens
    pattern, _ = layer_pattern(ahead, config, slots)
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
            # All that was read is rotated by the other factors from now on, and what
            # later layers made of it changes too. As transformers does for Phi-3.
            caches = jax.lax.cond(
                here.max() == longest, lambda: reread(state.tokens), lambda: caches
            )
        _, rotations = layer_pattern(here, config, slots)
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

            return layer(x, own.rotation_of(rotations), attend)

        def stacked_layer(
            x: Array, part: tuple[Params, Pattern, Cache]
        ) -> tuple[Array, Cache]:
            return one_layer(x, nnx.merge(layer_graph, part[0]), *part[1:])

        x = decoder.stream(token, here, dtype)
        if layers is None:
            stacked = params["layers"], pattern, caches
            x, caches = jax.lax.scan(stacked_layer, x, stacked)
        else:
            patterns = each_layer(pattern, config.num_layers)
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
        ends = jnp.array([*eos_token_ids, NOT_A_TOKEN], jnp.int32)
        done = state.done | (token[:, None] == ends[None]).any(axis=1)
        lengths = state.lengths + (~state.done).astype(jnp.int32)
        return _State(state.step + 1, tokens, lengths, done, state.caches)

    empty = jnp.full((batch, max_new_tokens), pad_token_id, jnp.int32)
    none = jnp.zeros(batch, jnp.int32)
    start = _State(jnp.int32(0), empty, none, none != 0, caches)
    end = jax.lax.while_loop(
        lambda state: (state.step < max_new_tokens) & ~state.done.all(),
        one_token,
        put_token(start, choose(x, jnp.int32(0))),
    )
    return Completions(end.tokens, end.lengths, end.step)


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
