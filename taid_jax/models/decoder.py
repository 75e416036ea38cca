"""The decoder, written once: the families differ by the settings of `DecoderConfig`."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from taid_jax.errors import ModelError
from taid_jax.models.attention import (
    Window,
    batch_positions,
    batch_segments,
    scoring_of,
)
from taid_jax.models.config import DecoderConfig
from taid_jax.models.kernels import attend as attend_by_kernel
from taid_jax.models.layers import Embedding, Layer, Linear, Stream, stream_norm
from taid_jax.models.rope import Rotation, Rotations, layer_rotations
from taid_jax.sharding import constrain
from taid_jax.types import Batch, Head, ModelFunctions, Params

_SAVED: dict[str, tuple[str, ...]] = {
    "none": ("projected", "attended", "part", "middle", "gated"),
    "dots": ("projected", "part", "middle", "gated"),
    "full": (),
}
"""What the backward pass of a layer keeps beside the layer's input: every product; all
but the attention's; nothing. Norms and activations are cheap and computed again."""


class Decoder(nnx.Module):
    """The whole model; its layers are one `Layer` with a leading axis everywhere."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.embed = Embedding("vocab", config.padded_vocab_size, config, rngs)
        stack = nnx.vmap(Layer, in_axes=(None, 0))
        self.layers = stack(config, rngs.split(config.num_layers))
        self.final_norm = stream_norm(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(
                {"embed": config.d_model},
                {"vocab": config.padded_vocab_size},
                bias=config.head_bias,
                scale=config.initializer_range,
                rngs=rngs,
            )
        self.has_positions = config.learned_positions
        if self.has_positions:
            self.positions = Embedding(
                "positions", config.max_position_embeddings, config, rngs
            )
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else None

    def stream(
        self,
        ids: Int[Array, "batch length"],
        positions: Int[Array, "rows length"],
        dtype: DTypeLike,
    ) -> Stream:
        """Returns what the first layer reads of the tokens."""
        x = self.embed(ids, dtype)
        if self.scale is not None:
            x *= jnp.asarray(self.scale, x.dtype)
        if self.has_positions:
            x += jnp.broadcast_to(self.positions(positions, dtype), x.shape)
        return x


class Pattern(NamedTuple):
    """What differs from layer to layer beside the parameters: arrays to scan along.

    None where all layers are alike, so that nothing is computed for it.

    Attributes:
        window: `(layers,)`, how far each sees; beyond any sequence if it sees all.
        rotation: `(layers,)`, which of several rotations each takes.
    """

    window: Int[Array, "*layers"] | None
    rotation: Int[Array, "*layers"] | None

    def window_of(self, config: DecoderConfig) -> Window:
        """Returns the window of the layer that this is a slice for."""
        return config.windows[0] if self.window is None else self.window

    def rotation_of(self, rotations: Rotations | None) -> Rotation | None:
        """Returns the rotation of the layer that this is a slice for."""
        if self.rotation is None:
            return rotations
        return jax.tree.map(lambda stacked: stacked[self.rotation], rotations)


def layer_pattern(
    positions: Int[Array, "rows length"], config: DecoderConfig, length: int
) -> tuple[Pattern, Rotations | None]:
    """Returns what differs between the layers, and the rotations they take from.

    Tokens at `positions` may see `length`: windows that hold all of these do nothing.
    """
    rotations, index = layer_rotations(positions, config)
    window, sizes = None, set(config.windows)
    if len(sizes) > 1 and any(each and each < length for each in sizes):
        whole = int(np.iinfo(np.int32).max)
        window = jnp.asarray([each or whole for each in config.windows], jnp.int32)
    return Pattern(window, None if index is None else jnp.asarray(index)), rotations


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
    axes = jax.tree.map(
        lambda variable: variable.get_metadata("axes"),
        nnx.state(module),
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    axes = nnx.to_pure_dict(axes)
    stacked = jax.tree.map(
        lambda names: ("layers", *names),
        axes["layers"],
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return {**axes, "layers": stacked}


@functools.cache
def _graph(config: DecoderConfig) -> nnx.GraphDef[Decoder]:
    """Returns the structure of the modules, without their arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


def merge(params: Params, config: DecoderConfig) -> tuple[Decoder, nnx.GraphDef[Layer]]:
    """Returns the modules over these arrays, and the structure of a single layer.

    `nnx.merge(structure, layer_params)` is one layer; `layer_params` is a slice of
    `params["layers"]`.
    """
    decoder = nnx.merge(_graph(config), params)
    return decoder, nnx.graphdef(decoder.layers)


def hidden_states(
    params: Params,
    batch: Batch,
    config: DecoderConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    unroll: int = 1,
) -> Float[Array, "batch length d_model"]:
    """Returns the hidden states after the last norm, in `dtype`.

    Args:
        params: As `init_params` gives them, in any float dtype.
        batch: `input_ids` `(batch, length)`; `attention_mask` when padded, left or
            right; `segment_ids` and `positions` when packed.
        config: The architecture.
        dtype: Of the computation; norms and softmax are float32 inside.
        remat: What the backward pass computes again instead of keeping it: "none" no
            product, "dots" the attention, "full" whole layers.
        unroll: Layers in one turn of the loop over layers, at least 1.

    Raises:
        ModelError: If `remat` is none of the three, or a sequence is longer than the
            model has learned positions.
    """
    if remat not in _SAVED:
        raise ModelError(f"remat: need one of {tuple(_SAVED)}, got {remat!r}")
    decoder, layer_graph = merge(params, config)
    ids, positions = jnp.asarray(batch["input_ids"]), batch_positions(batch)
    check_length(ids.shape[1], config)
    segments, scoring = batch_segments(batch), scoring_of(config)
    pattern, rotations = layer_pattern(positions, config, ids.shape[1])

    policy = jax.checkpoint_policies.save_only_these_names(*_SAVED[remat])

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def step(x: Array, part: tuple[Params, Pattern]) -> tuple[Array, None]:
        layer_params, own = part

        def attend(queries: Array, keys: Array, values: Array) -> tuple[Array, None]:
            attended = attend_by_kernel(
                queries,
                keys,
                values,
                segments,
                window=own.window_of(config),
                scoring=scoring,
                size=config.window,
            )
            return attended, None

        layer = nnx.merge(layer_graph, layer_params)
        x, kept = layer(x, own.rotation_of(rotations), attend)
        return constrain(x, ("batch", "length", None)), kept

    x = decoder.stream(ids, positions, dtype)
    x, _ = jax.lax.scan(step, x, (params["layers"], pattern), unroll=unroll)
    return decoder.final_norm(x)


def check_length(length: int, config: DecoderConfig) -> None:
    """Raises if a sequence has positions for which there is no learned row.

    Raises:
        ModelError: If it is longer than the model's context, and positions are learned.
    """
    if config.learned_positions and length > config.max_position_embeddings:
        raise ModelError(
            f"a sequence of {length} tokens is too long: the model has learned "
            f"{config.max_position_embeddings} positions; give shorter sequences"
        )


def head(params: Params, config: DecoderConfig) -> Head:
    """Returns the head; of tied embeddings, the table as it is."""
    cap = config.head_softcap
    padded = config.vocab_size < config.padded_vocab_size
    real = config.vocab_size if padded else None
    if config.tie_embeddings:
        table = params["embed"]["embedding"]
        return Head(table, softcap=cap, vocab_size=real, transposed=True)
    own = params["lm_head"]
    return Head(own["kernel"], own.get("bias"), softcap=cap, vocab_size=real)


def decoder_functions(
    config: DecoderConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    unroll: int = 1,
) -> ModelFunctions:
    """Returns what a train step needs of the decoder.

    Args:
        config: The architecture.
        dtype: Of the computation, whatever the parameters have.
        remat: As in `hidden_states`.
        unroll: Layers in one turn of the loop over layers, at least 1.
    """
    hidden = functools.partial(
        hidden_states, config=config, dtype=dtype, remat=remat, unroll=unroll
    )
    return ModelFunctions(hidden=hidden, head=lambda params: head(params, config))


def select_layers(
    params: Params, config: DecoderConfig, num_layers: int
) -> tuple[dict[str, Any], DecoderConfig]:
    """Returns a shallower decoder made of evenly spaced layers of this one.

    The first and the last layer are kept; a single layer is the first.

    Args:
        params: Parameters, or their shapes.
        config: The architecture.
        num_layers: Layers to keep.

    Returns:
        The parameters and the settings of the shallower decoder.

    Raises:
        ModelError: If there are fewer layers than that.
    """
    if not 1 <= num_layers <= config.num_layers:
        raise ModelError(
            f"student layers: need 1 to {config.num_layers}, the layers of the "
            f"teacher, got {num_layers}"
        )
    chosen = np.linspace(0, config.num_layers - 1, num_layers).round().astype(int)
    layers = jax.tree.map(lambda leaf: leaf[chosen], params["layers"])
    shallow = dataclasses.replace(
        config,
        num_layers=num_layers,
        window_layers=_chosen(config.window_layers, chosen),
        rope_layers=_chosen(config.rope_layers, chosen),
    )
    return {**params, "layers": layers}, shallow


def _chosen(
    pattern: tuple[bool, ...] | None, layers: np.ndarray
) -> tuple[bool, ...] | None:
    return pattern and tuple(pattern[layer] for layer in layers)
