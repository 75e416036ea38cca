"""A teacher that sees other rows than the student, as the train step takes any."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from taid_jax.sharding import constrain
from taid_jax.types import Batch, ModelFunctions, Params

_OWN = "teacher_"
_READ = ("input_ids", "segment_ids", "positions", "attention_mask")


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
