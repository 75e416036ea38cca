"""The decoder, written once: the families differ by the settings of `DecoderConfig`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from taid_jax.models.config import DecoderConfig
from taid_jax.types import Params


class Linear(nnx.Module):
    """A linear map between named axes, with or without a bias.

    Args:
        inputs: Size of each input axis.
        outputs: Size of each output axis.
    """

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


class RMSNorm(nnx.Module):
    """A division by the root mean square, in float32, and a learned scale."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size), axes=("norm",))
        self.eps = eps


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


class Layer(nnx.Module):
    """One layer: attention and MLP, each after a norm and added to the stream."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config, rngs)


class Embedding(nnx.Module):
    """A row of numbers per token id."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.d_model)
        table = config.initializer_range * jax.random.normal(rngs.params(), shape)
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))


class Decoder(nnx.Module):
    """The whole model; its layers are one `Layer` with a leading axis everywhere."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.embed = Embedding(config, rngs)
        stack = nnx.vmap(Layer, in_axes=(None, 0))
        self.layers = stack(config, rngs.split(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = Linear(
                {"embed": config.d_model},
                {"vocab": config.vocab_size},
                bias=False,
                scale=config.initializer_range,
                rngs=rngs,
            )


def init_params(
    config: DecoderConfig, rng: Array, dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Returns random parameters: a plain nested dict, layers stacked on axis 0.

    Args:
        config: The architecture.
        rng: A key of `jax.random`.
        dtype: Of every parameter.
    """
    module = Decoder(config, nnx.Rngs(rng))
    params = nnx.to_pure_dict(nnx.state(module))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def abstract_params(
    config: DecoderConfig, dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Returns the shapes of `init_params` as `jax.ShapeDtypeStruct`, without arrays."""
    init = functools.partial(init_params, config, dtype=dtype)
    return jax.eval_shape(init, jax.random.key(0))


def param_axes(config: DecoderConfig) -> dict[str, Any]:
    """Returns the same tree with the logical name of each axis, a tuple per leaf."""
    module = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    axes = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        names = variable.get_metadata("axes")
        node = axes
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = ("layers", *names) if path[0] == "layers" else names
    return axes
