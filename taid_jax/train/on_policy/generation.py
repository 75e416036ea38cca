"""Completions that a model writes to prompts, and the tokens that end them."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from taid_jax.data import DataError, Dataset, pad_left
from taid_jax.data import Tokenizer as DataTokenizer
from taid_jax.data.chat import ChatRenderer
from taid_jax.data.documents import Chat
from taid_jax.data.errors import RecordError
from taid_jax.data.tokens import Encoder
from taid_jax.errors import show
from taid_jax.models.config import DecoderConfig
from taid_jax.models.files.load import LoadedModel
from taid_jax.models.files.tokenizer import Tokenizer, warn
from taid_jax.models.files.vocabulary import count_tokens
from taid_jax.models.generation import generate, prepare, refuse_nonfinite
from taid_jax.models.sampling import GREEDY, SamplingParams
from taid_jax.sharding import place_batch, replicated
from taid_jax.train.on_policy.prompts import (
    EvalPrompt,
    Job,
    Prompt,
    find_eval_prompts,
)
from taid_jax.types import FSDP, Params

NumpyBatch = dict[str, np.ndarray]
Complete = Callable[[Params, NumpyBatch, int], NumpyBatch]
"""`(params, rows of this process, step) -> rows of all processes`, with `tokens` and
`lengths` of their completions beside what was given."""

_LOOKED_AT = 64
"""So many prompts are looked at to see how their answers end."""

_WIDTH = 64
"""Prompts of files are padded to a multiple of this, so that few shapes compile."""


def make_complete(
    config: DecoderConfig,
    mesh: Mesh,
    *,
    shardings: Any,
    ends: Sequence[int],
    max_new_tokens: int,
    dtype: DTypeLike,
    sampling: SamplingParams = GREEDY,
    seed: int = 0,
) -> Complete:
    """Returns the function that has a model complete the prompts of a batch.

    It runs on the parameters where they are; only the axis that cuts the weights
    themselves is gathered, once a batch and in the dtype of the computation, not once a
    token. Its batches hold `prompt_ids` and `prompt_mask`, padded on the left. A model
    whose logits are not finite is a ModelError.

    Args:
        config: Of the model.
        mesh: Where parameters and batches are.
        shardings: Of the parameters.
        ends: Tokens that end a completion.
        max_new_tokens: Tokens of a completion at most.
        dtype: Of the computation.
        sampling: How tokens are taken.
        seed: Of the draws.
    """
    whole = jax.tree.map(_without_fsdp, shardings)

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
            max_new_tokens=max_new_tokens,
            eos_token_ids=ends,
            pad_token_id=0,
            sampling=sampling,
            key=jax.random.fold_in(jax.random.key(seed), step),
            dtype=dtype,
        )
        return batch | {"tokens": found.tokens, "lengths": found.lengths}

    compiled = jax.jit(run, out_shardings=replicated(mesh))

    def complete(params: Params, rows: NumpyBatch, step: int) -> NumpyBatch:
        found = compiled(params, place_batch(rows, mesh), jnp.int32(step))
        completed = {name: np.asarray(value) for name, value in found.items()}
        refuse_nonfinite(completed["tokens"])
        return completed

    return complete


def _without_fsdp(sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding of weights that every device of the fsdp axis has whole."""

    def keep(entry: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        axes = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(axis for axis in axes if axis != FSDP) or None

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
    ends = end_ids(tokenizer, model.generation)
    room = model.config.max_position_embeddings - job.max_new_tokens
    unroll = None if mesh.size == 1 else False
    prepared = prepare(model.params, model.config, unroll=unroll)
    seed = jax.random.key(job.seed)
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        longest = max(len(prompt.ids) for prompt in batch)
        # The last batch repeats prompts, so that all have one shape.
        rows = [batch[row % len(batch)] for row in range(batch_size)]
        width = min(-(-longest // _WIDTH) * _WIDTH, room)
        ids, mask = pad_left([prompt.ids for prompt in rows], width)
        placed = place_batch({"ids": ids, "mask": mask}, mesh)
        numbers = jnp.array([prompt.number for prompt in rows])
        found = generate(
            prepared,
            model.config,
            placed["ids"],
            placed["mask"],
            max_new_tokens=job.max_new_tokens,
            eos_token_ids=ends,
            pad_token_id=0,
            sampling=job.sampling,
            key=jax.vmap(jax.random.fold_in, (None, 0))(seed, numbers),
            dtype=jnp.dtype(job.dtype),
        )
        tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)
        records = []
        for row, prompt in enumerate(batch):
            said = tokens[row, : lengths[row]]
            text = decode(tokenizer, said, ends, strip=False)
            if text.strip():
                about = {"number": prompt.number, "finished": int(said[-1]) in ends}
                records.append(prompt.completed(text) | about)
        yield records


def decode(
    tokenizer: Tokenizer, ids: np.ndarray, ends: Sequence[int], *, strip: bool = True
) -> str:
    """Returns the text of the tokens before the first that ends a completion."""
    stops = np.flatnonzero(np.isin(ids, ends))
    kept = ids[: stops[0]] if len(stops) else ids
    # As it stands: some tokenizers would take the space before a comma away.
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = str(tokenizer.decode(kept.tolist(), **options))
    return text.strip() if strip else text


def end_ids(
    tokenizer: Tokenizer,
    generation: Mapping[str, object],
    prompts: Sequence[EvalPrompt] = (),
) -> tuple[int, ...]:
    """Returns the tokens that end a completion, in order.

    The tokenizer's end token, those of the model's generation_config.json, and what the
    chat template, or at least half of the references, end with, where that is a token
    not learned from text.
    """
    named = [tokenizer.eos_token_id, generation.get("eos_token_id")]
    known = [n for each in named for n in (each if isinstance(each, list) else [each])]
    added = _added_ids(tokenizer)
    # Running text is cut anywhere, so that any token may end one of its references.
    ended = collections.Counter(int(prompt.reference[-1]) for prompt in prompts)
    last = {n for n, times in ended.items() if 2 * times >= len(prompts)} & added
    if (end := template_end(tokenizer)) is not None:
        known.append(end.token)
    ends = last.union(n for n in known if isinstance(n, int))
    return tuple(sorted(n for n in ends if 0 <= n < count_tokens(tokenizer)))


class TemplateEnd(NamedTuple):
    """What a chat template ends an answer with.

    Attributes:
        text: All that follows the answer.
        token: The first in it that is not learned from text; None without any.
    """

    text: str
    token: int | None


def template_end(tokenizer: Tokenizer) -> TemplateEnd | None:
    """Returns how the chat template ends an answer, as any conversation shows.

    None without a template, or if no answer is found in what it renders.
    """
    encoder = Encoder(cast(DataTokenizer, tokenizer))
    renderer = ChatRenderer(encoder.tokenizer, train_on_prompts=False)
    if not renderer.has_template:
        return None
    try:
        # A character that no header of a template has.
        asked = renderer.chat(Chat.pair("a", "\ue000"))
    except DataError as error:
        no_end = isinstance(error, RecordError) and error.reason == "no_end"
        return TemplateEnd("", None) if no_end else None
    if not asked.answers:
        return None
    text = asked.text.partition("\ue000")[2]
    added = _added_ids(tokenizer)
    [ids] = encoder.ids([text])
    return TemplateEnd(text, next((n for n in ids if n in added), None))


def _added_ids(tokenizer: Tokenizer) -> set[int]:
    """Returns the tokens not learned from text, without that of unknown text."""
    # transformers declares this method on its subclasses alone.
    added = cast(DataTokenizer, tokenizer).get_added_vocab().values()
    return {number for number in added if number != tokenizer.unk_token_id}


def training_ends(
    tokenizer: Tokenizer, generation: Mapping[str, object], dataset: Dataset
) -> tuple[int, ...]:
    """Returns `end_ids` as the training side of a data set shows them."""
    try:
        prompts = find_eval_prompts(dataset.train, _LOOKED_AT)
    except DataError:  # No example has a prompt.
        prompts = []
    return end_ids(tokenizer, generation, prompts)


def export_generation(
    generation: Mapping[str, object], tokenizer: Tokenizer, dataset: Dataset
) -> dict[str, object]:
    """Returns the settings of generation that a student is exported with.

    Whatever ends an answer in training is among its `eos_token_id`, so that generation
    stops there elsewhere too. Where a template ends an answer by text that is no single
    token, no id can say so. `stop_strings` could, but with them in the settings
    `generate` of transformers fails unless it is given the tokenizer: a warning names
    them instead.
    """
    ends = list(training_ends(tokenizer, generation, dataset))
    end = template_end(tokenizer)
    if end is not None and end.token is None:
        text = show(" ".join(end.text.split()))
        warn(
            [
                f"the chat template ends an answer by {text}, which is no token of its "
                "own, so that no eos_token_id can stop generation there: generate with "
                f"stop_strings=[{text}] and tokenizer=..., or train with a tokenizer "
                "that has such a token"
                if end.text.strip()
                else "the chat template writes nothing after an answer: nothing but "
                "the end token stops generation"
            ]
        )
    if not ends:
        return dict(generation)
    return {**generation, "eos_token_id": ends if len(ends) > 1 else ends[0]}
