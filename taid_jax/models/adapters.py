"""Models of other people's making, as the functions that the train step takes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen, nnx
from jax import Array

from taid_jax.types import Batch, Head, ModelFunctions, Params

Call = Callable[[Any, Batch], Array]
"""`(model, batch)` to logits, `(batch, length, vocab)`, or to hidden states."""


def _on_ids(model: Callable[[Array], Array], batch: Batch) -> Array:
    return model(jnp.asarray(batch["input_ids"]))


def linen_functions(
    model: linen.Module,
    *,
    call: Call = _on_ids,
    head: Callable[[Params], Head] | None = None,
    constants: Mapping[str, Any] | None = None,
) -> ModelFunctions:
    """Returns the functions of a Linen model; its parameters are the "params" alone.

    Args:
        model: The module, unbound.
        call: How the bound module is called on a batch: on `input_ids` unless given.
        head: `params -> Head` for a model whose call gives hidden states; the call
            gives logits when None.
        constants: Variable collections other than "params" that the call reads.
    """

    def run(params: Params, batch: Batch) -> Array:
        bound = model.bind({"params": params, **(constants or {})})
        return call(bound, batch)

    return _functions(run, head)


def nnx_functions(
    model: nnx.Module,
    *,
    call: Call = _on_ids,
    head: Callable[[Params], Head] | None = None,
) -> tuple[Params, ModelFunctions]:
    """Returns the parameters of an NNX model as a plain dict, and its functions.

    The model is split once, here; a step merges inside and updates the dict. States
    other than parameters (random streams, statistics) stay as they are now.

    Args:
        model: The module, with its arrays.
        call: How the module is called on a batch: on `input_ids` unless given.
        head: As in `linen_functions`.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params: Params, batch: Batch) -> Array:
        return call(nnx.merge(graph, nnx.State(params), rest), batch)

    return nnx.to_pure_dict(params), _functions(run, head)


def _functions(
    run: Callable[[Params, Batch], Array], head: Callable[[Params], Head] | None
) -> ModelFunctions:
    if head is None:
        return ModelFunctions(logits=run)
    return ModelFunctions(hidden=run, head=head)
