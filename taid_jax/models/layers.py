"""The parts of a decoder, as Flax NNX modules: what they hold and what they compute."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from taid_jax.models.config import DecoderConfig
from taid_jax.models.rope import Rotation, rotate
from taid_jax.sharding import constrain

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""`(queries, keys, values) -> (attended, kept)`: queries and attended are `(batch,
kv_heads, group, length, head_dim)`, keys and values `(batch, kv_heads, length,
head_dim)`; what is kept (a cache) goes back to the caller."""

Stream = Float[Array, "batch length d_model"]

_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Linear(nnx.Module):
    """A linear map between named axes, with or without a bias."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool,
        scale: float,
        rngs: nnx.Rngs,
    ):
        axes = inputs | outputs
        kernel = scale * jax.random.normal(rngs.params(), tuple(axes.values()))
        self.kernel = nnx.Param(kernel, axes=tuple(axes))
        if bias:
            zeros = jnp.zeros(tuple(outputs.values()))
            self.bias = nnx.Param(zeros, axes=tuple(outputs))
        self.has_bias, self.num_inputs = bias, len(inputs)
        self.outputs = tuple(outputs.values())

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the image of the last axes, in the dtype of `x`."""
        lead = x.shape[: x.ndim - self.num_inputs]
        # Plain matrices: neither pass then needs a transposed copy on any platform.
        rows = x.reshape(math.prod(lead), -1)
        matrix = self.kernel[...].reshape(rows.shape[1], -1)
        return self.finish(rows @ matrix.astype(x.dtype), lead)

    def finish(self, image: Array, lead: tuple[int, ...]) -> Array:
        """Returns the image of rows with its bias, in its own shape."""
        if self.has_bias:
            image += self.bias[...].astype(image.dtype).reshape(1, -1)
        return image.reshape(*lead, *self.outputs)


class Norm(nnx.Module):
    """A division by the spread of the last axes, in float32, and a learned scale.

    Args:
        axes: Name and size of the last axes of what is normed.
        kind: As `norm` of `DecoderConfig`.
        eps: Added to the mean square.
        over: How many of these axes are normed together; the others come before them.
    """

    def __init__(self, axes: dict[str, int], kind: str, eps: float, over: int = 1):
        shape = tuple(axes.values())
        start = jnp.zeros if kind == "rms_plus_one" else jnp.ones
        self.scale = nnx.Param(start(shape), axes=tuple(axes))
        self.has_bias = kind == "layer"
        if self.has_bias:
            self.bias = nnx.Param(jnp.zeros(shape), axes=tuple(axes))
        self.kind, self.eps, self.over = kind, eps, tuple(range(-over, 0))

    def __call__(self, x: Float[Array, "batch length ..."]) -> Float[Array, "..."]:
        """Returns the normed entries, in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        if self.kind in ("layer", "layer_no_bias"):
            wide -= jnp.mean(wide, self.over, keepdims=True)
        square = jnp.mean(wide * wide, self.over, keepdims=True)
        normed = wide * jax.lax.rsqrt(square + self.eps)
        scale = self._spread(self.scale[...], x.ndim)
        normed *= 1 + scale if self.kind == "rms_plus_one" else scale
        if self.has_bias:
            normed += self._spread(self.bias[...], x.ndim)
        return normed.astype(x.dtype)

    def _spread(self, param: Array, ndim: int) -> Array:
        shape = (1,) * (ndim - param.ndim) + param.shape
        return param.astype(jnp.float32).reshape(shape)


def stream_norm(config: DecoderConfig) -> Norm:
    """Returns a norm of the residual stream."""
    return Norm({"norm": config.d_model}, config.norm, config.norm_eps)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        embed = {"embed": config.d_model}
        queries = {"heads": config.num_heads, "head_dim": config.head_dim}
        keys = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        linear = functools.partial(Linear, scale=config.initializer_range, rngs=rngs)
        inner_bias = config.attention_bias or config.qkv_bias
        self.q_proj = linear(embed, queries, bias=inner_bias)
        self.k_proj = linear(embed, keys, bias=inner_bias)
        self.v_proj = linear(embed, keys, bias=inner_bias)
        self.o_proj = linear(queries, embed, bias=config.attention_bias)
        self.has_norm = config.qk_norm != "none"
        if self.has_norm:
            self.q_norm = _head_norm(config, queries)
            self.k_norm = _head_norm(config, keys)
        self.kv_heads = config.num_kv_heads

    def __call__(self, x: Stream, rotation: Rotation | None, attend: Attend):
        """Returns the attention's part of the stream, and what `attend` kept."""
        batch, length, _ = x.shape
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.has_norm:
            # What a norm read has to be kept; its result is made again from that.
            queries, keys, values = _kept((queries, keys, values), "projected")
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        head_dim = queries.shape[-1]
        # Query heads that share a key head become one group: (b, l, k, g, h).
        queries = queries.reshape(batch, length, self.kv_heads, -1, head_dim)
        queries = queries.transpose(0, 2, 3, 1, 4)
        keys, values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if not self.has_norm:
            queries, keys, values = _kept((queries, keys, values), "projected")
        attended, kept = attend(queries, keys, values)
        attended = attended.transpose(0, 3, 1, 2, 4)
        return self.o_proj(attended.reshape(batch, length, -1, head_dim)), kept


def _head_norm(config: DecoderConfig, axes: dict[str, int]) -> Norm:
    """Returns the norm of the queries or the keys, as `qk_norm` asks for it."""
    if config.qk_norm == "head":
        return Norm({"head_dim": config.head_dim}, config.norm, config.norm_eps)
    if config.qk_norm == "projection":
        return Norm(axes, config.norm, config.norm_eps, over=2)
    return Norm(axes, "layer_no_bias", config.norm_eps)


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        embed, mlp = {"embed": config.d_model}, {"mlp": config.mlp_dim}
        linear = functools.partial(
            Linear, bias=config.mlp_bias, scale=config.initializer_range, rngs=rngs
        )
        self.gated = config.gated_mlp
        if self.gated:
            self.gate_proj = linear(embed, mlp)
        self.up_proj = linear(embed, mlp)
        self.down_proj = linear(mlp, embed)
        self.activation = config.activation

    def __call__(self, x: Stream) -> Stream:
        """Returns the MLP's part of the stream."""
        act = _ACTIVATIONS[self.activation]
        if not self.gated:
            return self.down_proj(act(_kept(self.up_proj(x), "gated")))
        gate, up = _kept((self.gate_proj(x), self.up_proj(x)), "gated")
        return self.down_proj(act(gate) * up)


class Layer(nnx.Module):
    """One layer: attention and MLP, normed and added to the stream."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.before = config.norm_place != "after"
        self.after = config.norm_place != "before"
        self.residual = config.residual
        self.attention = Attention(config, rngs)
        self.mlp = MLP(config, rngs)
        if self.before:
            self.attention_norm = stream_norm(config)
        if self.before and self.residual != "parallel_one_norm":
            self.mlp_norm = stream_norm(config)
        if self.after:
            self.attention_post_norm = stream_norm(config)
            self.mlp_post_norm = stream_norm(config)

    def __call__(self, x: Stream, rotation: Rotation | None, attend: Attend):
        """Returns the stream after the layer, and what `attend` kept."""
        normed = self.attention_norm(x) if self.before else x
        part, kept = self.attention(normed, rotation, attend)
        if self.after:
            part = self.attention_post_norm(_kept(part, "part"))
        if self.residual == "sequential":
            x = _kept(x + part, "middle")
            normed = self.mlp_norm(x) if self.before else x
            part = self.mlp(normed)
            if self.after:
                part = self.mlp_post_norm(_kept(part, "part"))
            return x + part, kept
        if self.residual == "parallel":
            normed = self.mlp_norm(x)
        return x + part + self.mlp(normed), kept


_kept = checkpoint_name
"""Gives a name to what the backward pass may keep."""


class Embedding(nnx.Module):
    """A row of numbers per token id, or per position; `axis` names that of the rows."""

    def __init__(self, axis: str, rows: int, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (rows, config.d_model)
        table = config.initializer_range * jax.random.normal(rngs.params(), shape)
        self.embedding = nnx.Param(table, axes=(axis, "embed"))

    def __call__(self, ids: Int[Array, "rows length"], dtype: DTypeLike) -> Stream:
        """Returns the rows of the ids.

        Devices along `fsdp` hold a part of every row each: they exchange parts, so that
        none ever holds all tokens.
        """
        ids = constrain(ids, ("batch_of_parts", "length"))
        parts = self.embedding[...][ids].astype(dtype)
        parts = constrain(parts, ("batch_of_parts", "length", "embed"))
        return constrain(parts, ("batch", "length", None))
