"""Completions that a model writes to prompts."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Key

from taid_jax.data import pad_left
from taid_jax.models.config import DecoderConfig
from taid_jax.models.files.load import LoadedModel
from taid_jax.models.generation import Prepared, generate, prepare, refuse_nonfinite
from taid_jax.models.sampling import GREEDY, SamplingParams
from taid_jax.sharding import batch_part, place_batch, replicated
from taid_jax.train.on_policy.ends import decode, end_ids
from taid_jax.train.on_policy.prompts import Job, Prompt
from taid_jax.types import TENSOR, Params

Complete = Callable[
    [Params, Sequence[Sequence[int] | np.ndarray], Sequence[tuple[int, ...]]],
    list[np.ndarray],
]
"""`(params, prompts, numbers) -> completions`, as `Completer` has it."""

_WIDTH = 64
"""Prompts are padded to a multiple of this, so that few shapes compile."""


class Completer:
    """Has a model complete prompts, those of like lengths together.

    It runs on the parameters where they are; only the axes that cut the weights
    themselves are gathered, once a call and in the dtype of the computation, not once a
    token. A program is compiled for each width of prompts, a multiple of 64 tokens, and
    serves for all later calls. What is drawn for a prompt depends on the seed and the
    prompt's numbers, not on which others there are, on devices or on processes.

    Args:
        config: Of the model.
        mesh: Where parameters and batches are.
        shardings: Of the parameters.
        ends: Tokens that end a completion.
        max_new_tokens: Tokens of a completion at most.
        dtype: Of the computation.
        rows: Prompts at once, over all processes.
        sampling: How tokens are taken.
        seed: Of the draws.
    """

    def __init__(
        self,
        config: DecoderConfig,
        mesh: Mesh,
        *,
        shardings: Any,
        ends: Sequence[int],
        max_new_tokens: int,
        dtype: DTypeLike,
        rows: int,
        sampling: SamplingParams = GREEDY,
        seed: int = 0,
    ):
        self.ends, self._rows, self._mesh = tuple(ends), rows, mesh
        self._room = config.max_position_embeddings - max_new_tokens
        whole = jax.tree.map(_only_tensor, shardings)

        def lay_out(params: Params) -> Prepared:
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
            params = jax.lax.with_sharding_constraint(params, whole)
            # Laid out layer by layer it is faster on a CPU, but only on a single one.
            return prepare(params, config, unroll=None if mesh.size == 1 else False)

        def key_of(numbers: Int[Array, " numbers"]) -> Key[Array, ""]:
            key = jax.random.key(seed)
            for number in numbers:
                key = jax.random.fold_in(key, number)
            return key

        def run(prepared: Prepared, batch: dict[str, Array]) -> tuple[Array, Array]:
            found = generate(
                prepared,
                config,
                batch["ids"],
                batch["mask"],
                max_new_tokens=max_new_tokens,
                eos_token_ids=ends,
                pad_token_id=0,
                sampling=sampling,
                key=jax.vmap(key_of)(batch["numbers"]),
                dtype=dtype,
            )
            return found.tokens, found.lengths

        self._lay_out = jax.jit(lay_out)
        self._run = jax.jit(run, out_shardings=replicated(mesh))

    def prepare(self, params: Params) -> Prepared:
        """Returns parameters for several calls, laid out once for all."""
        return self._lay_out(params)

    def __call__(
        self,
        params: Params | Prepared,
        prompts: Sequence[Sequence[int] | np.ndarray],
        numbers: Sequence[tuple[int, ...]],
    ) -> list[np.ndarray]:
        """Returns the completion of each prompt, with the token that ended it.

        Args:
            params: Of the model, or what `prepare` made of them.
            prompts: Token ids, the same on all processes; none is empty, and each
                leaves room for a completion.
            numbers: What the draws of each depend on, as many for each.

        Returns:
            int32 ids, the same on all processes.

        Raises:
            ModelError: If the model's logits are not finite.
        """
        if not isinstance(params, Prepared):
            params = self.prepare(params)
        part, parts = batch_part(self._mesh)
        size = self._rows // parts
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        found = [np.zeros(0, np.int32)] * len(prompts)
        for first in range(0, len(order), self._rows):
            chunk = order[first : first + self._rows]
            # The last repeats its prompts, so that all have the same rows.
            rows = [
                chunk[n % len(chunk)] for n in range(part * size, part * size + size)
            ]
            longest = -(-len(prompts[chunk[-1]]) // _WIDTH) * _WIDTH
            width = min(longest, self._room)
            ids, mask = pad_left([prompts[row] for row in rows], width)
            given = np.array([numbers[row] for row in rows], np.int32)
            batch = {"ids": ids, "mask": mask, "numbers": given}
            said, lengths = map(
                np.asarray, self._run(params, place_batch(batch, self._mesh))
            )
            refuse_nonfinite(said)
            for row, place in enumerate(chunk):
                found[place] = said[row, : lengths[row]]
        return found


def _only_tensor(sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding of weights that is cut over the tensor axis alone."""

    def keep(entry: str | tuple[str, ...] | None) -> str | None:
        return TENSOR if entry == TENSOR or TENSOR in (entry or ()) else None

    spec = PartitionSpec(*(keep(entry) for entry in sharding.spec))
    return NamedSharding(sharding.mesh, spec)


def complete_prompts(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    job: Job,
    *,
    batch_size: int,
    mesh: Mesh,
) -> Iterator[list[dict[str, Any]]]:
    """Yields records with the completions of prompts, a batch at a time, in order.

    A completion without text is left out, as nothing could be learned of it. What is
    drawn for a prompt depends on the seed and its number, not on its batch, so that
    completions are the same however often the work was cut off.

    Args:
        model: With its tokenizer; its parameters lie on the mesh.
        prompts: Encoded; each leaves room for a completion.
        job: How they are completed.
        batch_size: Prompts at once.
        mesh: Where batches go.
    """
    tokenizer = cast(Any, model.tokenizer)
    complete = Completer(
        model.config,
        mesh,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, model.params),
        ends=end_ids(tokenizer, model.generation),
        max_new_tokens=job.max_new_tokens,
        dtype=jnp.dtype(job.dtype),
        rows=batch_size,
        sampling=job.sampling,
        seed=job.seed,
    )
    prepared, ends = complete.prepare(model.params), complete.ends
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        numbers = [(prompt.number,) for prompt in batch]
        records = []
        completions = complete(prepared, [prompt.ids for prompt in batch], numbers)
        for prompt, said in zip(batch, completions, strict=True):
            text = decode(tokenizer, said, ends, strip=False)
            if text.strip():
                about = {"number": prompt.number, "finished": int(said[-1]) in ends}
                records.append(prompt.completed(text) | about)
        yield records
