"""The student answers a batch of prompts, on its parameters where they are."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from taid_jax.models.config import DecoderConfig
from taid_jax.models.generation import generate, prepare, refuse_nonfinite
from taid_jax.models.sampling import SamplingParams
from taid_jax.settings import OnPolicySettings
from taid_jax.sharding import place_batch, replicated
from taid_jax.types import FSDP, Params

NumpyBatch = dict[str, np.ndarray]
AnswerRows = Callable[[Params, NumpyBatch, int], NumpyBatch]
"""`(params, rows of this process, step) -> rows of all processes`, with `tokens` and
`lengths` of their answers beside what was given."""


def make_answer_rows(
    config: DecoderConfig,
    settings: OnPolicySettings,
    mesh: Mesh,
    *,
    shardings: Any,
    ends: Sequence[int],
    dtype: DTypeLike,
    seed: int,
) -> AnswerRows:
    """Returns the function that has the student answer the prompts of a batch.

    It runs on the student's parameters where they are; only the axis that cuts the
    weights themselves is gathered, once a batch and in the dtype of the computation,
    not once a token. A student whose logits are not finite is a ModelError.

    Args:
        config: Of the student.
        settings: How it answers.
        mesh: Where parameters and batches are.
        shardings: Of the parameters.
        ends: Tokens that end an answer.
        dtype: Of the computation.
        seed: Of the draws.
    """
    sampling = SamplingParams(
        settings.completion_temperature,
        settings.completion_top_k,
        settings.completion_top_p,
    )
    whole = jax.tree.map(lambda where: _without_fsdp(where), shardings)

    def run(
        params: Params, batch: dict[str, Array], step: Int[Array, ""]
    ) -> dict[str, Array]:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        params = jax.lax.with_sharding_constraint(params, whole)
        found = generate(
            # Laid out layer by layer it is faster on a CPU, but only on a single one.
            prepare(params, config, unroll=None if mesh.size == 1 else False),
            config,
            batch["prompt_ids"],
            batch["prompt_mask"],
            max_new_tokens=settings.completion_tokens,
            eos_token_ids=ends,
            pad_token_id=0,
            sampling=sampling,
            key=jax.random.fold_in(jax.random.key(seed), step),
            dtype=dtype,
        )
        return batch | {"tokens": found.tokens, "lengths": found.lengths}

    compiled = jax.jit(run, out_shardings=replicated(mesh))

    def answer_rows(
        params: Params, rows: NumpyBatch, step: int
    ) -> dict[str, np.ndarray]:
        placed = place_batch(rows, mesh)
        found = compiled(params, placed, jnp.int32(step))
        answered = {name: np.asarray(value) for name, value in found.items()}
        refuse_nonfinite(answered["tokens"])
        return answered

    return answer_rows


def _without_fsdp(sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding of weights that every device of the fsdp axis has whole."""

    def keep(entry: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        axes = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(axis for axis in axes if axis != FSDP) or None

    spec = PartitionSpec(*(keep(entry) for entry in sharding.spec))
    return NamedSharding(sharding.mesh, spec)
