"""Several teachers, or one that sees other rows, as the train step takes one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int, Shaped

from taid_jax.loss import Teachers, TeachersHead
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import decoder_functions
from taid_jax.settings import ModelSettings
from taid_jax.sharding import constrain
from taid_jax.store.format import Manifest
from taid_jax.store.read import Store
from taid_jax.store.teacher import stored_functions
from taid_jax.types import Batch, ModelFunctions, Params

WEIGHTS = "teacher_weights"
"""What a batch calls the weights of the teachers, `(batch, length, teachers)`."""

_OWN = "teacher_"
_READ = ("input_ids", "segment_ids", "positions", "attention_mask")


def mix_teachers(
    teachers: Sequence[ModelFunctions],
    weights: Sequence[float] | None = None,
    *,
    mean: Literal["arithmetic", "geometric"] = "arithmetic",
) -> ModelFunctions:
    """Returns the functions of several teachers that teach together.

    Their parameters are those of all, as `join_params` has them. All of them run on
    every token, whatever the weights.

    Args:
        teachers: Each with hidden states and head. One whose outputs come with the
            batch finds its columns there under their own names, and they lie there
            under those that `join_columns` gives.
        weights: Of the teachers; None where each batch has them, as `teacher_weights`
            of shape `(batch, length, teachers)`.
        mean: Of their distributions; see `loss.TeachersHead`.

    Raises:
        ValueError: If a teacher has logits alone, or the weights are not one of each.
    """
    if not all(each.hidden and each.head for each in teachers):
        raise ValueError("need hidden and head of each of several teachers")
    if weights is not None and len(weights) != len(teachers):
        raise ValueError(
            f"need a weight for each of {len(teachers)} teachers, got {weights}"
        )

    def hidden(params: Params, batch: Batch) -> Teachers:
        rows = tuple(
            each.hidden(params[str(number)], _own_columns(batch, number))  # pyright: ignore
            for number, each in enumerate(teachers)
        )
        if weights is None:
            return Teachers(rows, jnp.asarray(batch[WEIGHTS]))
        shape = (*batch["input_ids"].shape, len(weights))
        return Teachers(rows, jnp.broadcast_to(jnp.float32(weights), shape))

    def head(params: Params) -> TeachersHead:
        heads = (
            each.head(params[str(number)])  # pyright: ignore
            for number, each in enumerate(teachers)
        )
        return TeachersHead(tuple(heads), mean)

    return ModelFunctions(hidden, head)


def join_params(params: Sequence[Any]) -> Any:
    """Returns the parameters of all teachers, or of the only one as they are."""
    if len(params) == 1:
        return params[0]
    return {str(number): each for number, each in enumerate(params)}


def join_columns(
    columns: Sequence[Mapping[str, Shaped[Any, "..."]]],
) -> dict[str, Shaped[Any, "..."]]:
    """Returns the columns of all stores, or of the only one, under different names."""
    if len(columns) == 1:
        return dict(columns[0])
    return {
        f"{number}/{name}": values
        for number, each in enumerate(columns)
        for name, values in each.items()
    }


def _own_columns(batch: Batch, number: int) -> Batch:
    """Returns a batch as one of several teachers is to see it."""
    prefix = f"{number}/"
    own = {k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)}
    return {**batch, **own}


class StoreColumns:
    """The columns of several stores as those of one: see `data.batches.TokenColumns`.

    Args:
        stores: At least one.
    """

    def __init__(self, stores: Sequence[Store]):
        self._stores = tuple(stores)

    def blank(self, shape: tuple[int, int]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Returns the columns of a batch without tokens, `(*shape, width)` each."""
        return join_columns([store.blank(shape) for store in self._stores])

    def read(
        self, ids: Int[np.ndarray, " tokens"], start: int = 0
    ) -> Mapping[str, Shaped[np.ndarray, "tokens _"]]:
        """Returns the columns of an example, `(tokens, width)` each."""
        return join_columns([store.read(ids, start) for store in self._stores])


def on_own_rows(teacher: ModelFunctions) -> ModelFunctions:
    """Returns functions of a teacher that runs on its own rows of a batch.

    What they give has the student's positions: at each what the teacher says at the
    place in its row that predicts the same token, `teacher_index`, `(batch, length)`
    int32. Where there is none (-1) it is what it says at its first, which must not
    count.

    Args:
        teacher: Functions of the teacher; it sees `teacher_input_ids` and what else of
            the teacher's a batch has, as `input_ids` and so on.
    """

    def gathered(
        output: Callable[[Params, Batch], Array],
    ) -> Callable[[Params, Batch], Array]:
        def on_rows(params: Params, batch: Batch) -> Array:
            own = {name: batch[_OWN + name] for name in _READ if _OWN + name in batch}
            index = jnp.maximum(jnp.asarray(batch["teacher_index"]), 0)
            found = output(params, own)
            # One row at a time: nothing of another device's is needed.
            found = jnp.take_along_axis(found, jnp.expand_dims(index, -1), axis=1)
            return constrain(found, ("batch", "length", None))

        return on_rows

    return ModelFunctions(
        hidden=teacher.hidden and gathered(teacher.hidden),
        head=teacher.head,
        logits=teacher.logits and gathered(teacher.logits),
    )


def teacher_functions(
    settings: ModelSettings,
    configs: Sequence[DecoderConfig],
    manifests: Sequence[Manifest] = (),
    *,
    own_rows: bool = False,
) -> ModelFunctions:
    """Returns the functions of the one teacher, or of all, that settings ask for.

    Args:
        settings: Of the run.
        configs: Architectures of the teachers.
        manifests: Of the stores that stand for them, if these do.
        own_rows: Whether they see rows of their own, all the same; see `on_own_rows`.
    """
    dtype = jnp.dtype(settings.dtype)
    if manifests:
        found = [
            stored_functions(
                about.kind, config, dtype=dtype, tail=settings.tail, draws=about.draws
            )
            for about, config in zip(manifests, configs, strict=True)
        ]
    else:
        found = [
            decoder_functions(config, dtype=dtype, unroll=settings.layer_unroll)
            for config in configs
        ]
    if own_rows:
        found = [on_own_rows(each) for each in found]
    if len(found) == 1:
        return found[0]
    weights = None if settings.teacher_field else settings.shares_of_teachers
    return mix_teachers(found, weights, mean=settings.teacher_mean)
