"""The parts of a decoder, as Flax NNX modules: what they hold and what they compute."""

import functools
import math
from collections.abc import Callable
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

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""`(queries, keys, values) -> (attended, kept)`: queries and attended are `(batch,
kv_heads, group, length, head_dim)`, keys and values `(batch, kv_heads, length,
head_dim)`; what is kept (a cache) goes back to the caller."""

Stream = Float[Array, "batch length d_model"]


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
        self.turned = None

    def turn(self) -> None:
        """Keeps the kernel as (outputs, inputs), which a CPU reads best for few rows.

        The barriers keep the compiler from turning it back.
        """
        matrix = self.kernel[...].reshape(-1, math.prod(self.outputs))
        self.turned = jax.lax.optimization_barrier(matrix.T)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the image of the last axes, in the dtype of `x`."""
        lead = x.shape[: x.ndim - self.num_inputs]
        # Plain matrices: neither pass then needs a transposed copy on any platform.
        rows = x.reshape(math.prod(lead), -1)
        if self.turned is None:
            matrix = self.kernel[...].reshape(rows.shape[1], -1)
            image = rows @ matrix.astype(x.dtype)
        else:
            columns = self.turned.astype(x.dtype) @ rows.T
            image = jax.lax.optimization_barrier(columns).T
        if self.has_bias:
            image += self.bias[...].astype(x.dtype).reshape(1, -1)
        return image.reshape(*lead, *self.outputs)


class RMSNorm(nnx.Module):
    """A division by the root mean square, in float32, and a learned scale."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size), axes=("norm",))
        self.eps = eps

    def __call__(self, x: Stream) -> Stream:
        """Returns the normed rows, in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape(1, 1, -1)
        return (wide * inverse * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        embed = {"embed": config.d_model}
        queries = {"heads": config.num_heads, "head_dim": config.head_dim}
        keys = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        linear = functools.partial(
            Linear,
            bias=config.attention_bias,
            scale=config.initializer_range,
            rngs=rngs,
        )
        self.q_proj = linear(embed, queries)
        self.k_proj = linear(embed, keys)
        self.v_proj = linear(embed, keys)
        self.o_proj = linear(queries, embed)
        self.kv_heads = config.num_kv_heads

    def __call__(self, x: Stream, turn: Rotation, attend: Attend):
        """Returns the attention's part of the stream, and what `attend` kept."""
        batch, length, _ = x.shape
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        head_dim = queries.shape[-1]
        # Query heads that share a key head become one group: (b, l, k, g, h).
        queries = queries.reshape(batch, length, self.kv_heads, -1, head_dim)
        queries = rotate(queries.transpose(0, 2, 3, 1, 4), turn)
        keys = rotate(keys.transpose(0, 2, 1, 3), turn)
        values = values.transpose(0, 2, 1, 3)
        queries, keys, values = checkpoint_name((queries, keys, values), "projected")
        attended, kept = attend(queries, keys, values)
        attended = attended.transpose(0, 3, 1, 2, 4)
        return self.o_proj(attended.reshape(batch, length, -1, head_dim)), kept


class MLP(nnx.Module):
    """A gated MLP: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        embed, mlp = {"embed": config.d_model}, {"mlp": config.mlp_dim}
        linear = functools.partial(
            Linear, bias=config.mlp_bias, scale=config.initializer_range, rngs=rngs
        )
        self.gate_proj = linear(embed, mlp)
        self.up_proj = linear(embed, mlp)
        self.down_proj = linear(mlp, embed)

    def __call__(self, x: Stream) -> Stream:
        """Returns the MLP's part of the stream."""
        gate, up = checkpoint_name((self.gate_proj(x), self.up_proj(x)), "gated")
        return self.down_proj(jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    """One layer: attention and MLP, each after a norm and added to the stream."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Stream, turn: Rotation, attend: Attend):
        """Returns the stream after the layer, and what `attend` kept."""
        part, kept = self.attention(self.attention_norm(x), turn, attend)
        x = checkpoint_name(x + part, "middle")
        return x + self.mlp(self.mlp_norm(x)), kept


class Embedding(nnx.Module):
    """A row of numbers per token id."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.d_model)
        table = config.initializer_range * jax.random.normal(rngs.params(), shape)
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(self, ids: Int[Array, "batch length"], dtype: DTypeLike) -> Stream:
        """Returns the rows of the ids."""
        return self.embedding[...][ids].astype(dtype)
