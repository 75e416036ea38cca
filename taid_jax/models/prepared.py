"""Parameters as generation reads them: laid out once for all tokens."""

import functools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import merge
from taid_jax.models.layers import Layer, Linear
from taid_jax.types import Params


class Prepared(NamedTuple):
    """Parameters as generation reads them.

    Attributes:
        params: As `init_params` gives them.
        layers: Each by itself, its kernels transposed; None where generation scans
            along the stacked layers.
    """

    params: Params
    layers: list[Layer] | None


class _Transposed(nnx.Module):
    """A linear map whose kernel is (outputs, inputs), which a CPU reads best."""

    def __init__(self, linear: Linear):
        matrix = linear.kernel[...].reshape(-1, math.prod(linear.outputs)).T
        # Within a larger program the compiler would transpose it back, in every step.
        self.kernel = nnx.Param(jax.lax.optimization_barrier(matrix))
        self.linear = linear
        del linear.kernel

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        lead = x.shape[: x.ndim - self.linear.num_inputs]
        rows = x.reshape(math.prod(lead), -1)
        columns = self.kernel[...].astype(x.dtype) @ rows.T
        # Kept apart: the product takes a slow path when it transposes its result.
        return self.linear.finish(jax.lax.optimization_barrier(columns).T, lead)


def prepare(
    params: Params, config: DecoderConfig, *, unroll: bool | None = None
) -> Prepared:
    """Returns parameters for several calls of `generate`, laid out once for all.

    Args:
        params: Parameters of the decoder.
        config: Its architecture.
        unroll: Lay the layers out one after the other, with a copy of their weights as
            a CPU reads them best: about twice the tokens per second there, but
            compilation grows with the layers. On a CPU when None.
    """
    if unroll is None:
        unroll = jax.default_backend() == "cpu"
    return Prepared(params, _transposed_layers(params, config) if unroll else None)


@functools.partial(jax.jit, static_argnames="config")
def _transposed_layers(params: Params, config: DecoderConfig) -> list[Layer]:
    layer_graph = merge(params, config)[1]
    layers = []
    for part in each_layer(params["layers"], config.num_layers):
        layer = nnx.merge(layer_graph, part)
        for module in (layer.attention, layer.mlp):
            for name, child in list(vars(module).items()):
                if isinstance(child, Linear):
                    setattr(module, name, _Transposed(child))
        layers.append(layer)
    return layers


def each_layer(stacked: Any, num_layers: int) -> list[Any]:
    """Returns the layers of a stacked tree, one by one."""
    return [
        jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
        for index in range(num_layers)
    ]
