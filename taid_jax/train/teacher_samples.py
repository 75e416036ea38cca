"""A model's answers to prompts, written before training: sequence-level KD.

References:
    Kim and Rush, Sequence-Level Knowledge Distillation, 2016 (arXiv:1606.07947).
"""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from taid_jax.data import DataError, pad_left
from taid_jax.models.config import DecoderConfig
from taid_jax.models.files.load import LoadedModel
from taid_jax.models.generation import generate, prepare
from taid_jax.models.sampling import SamplingParams
from taid_jax.settings import SettingsError
from taid_jax.sharding import place_batch
from taid_jax.train.answers import end_ids
from taid_jax.train.prompts import Encoded

_WIDTH = 64
"""Prompts are padded to a multiple of this, so that few shapes are compiled."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What decides the answers, and so what a file may be continued with.

    Attributes:
        model: As the user called it.
        prompts: What `prompts.digest` says of them.
        max_new_tokens: Tokens of an answer at most.
        seed: Of the draws.
        sampling: How tokens are taken.
        dtype: Of the computation.
        template_date: What the chat template takes for today.
    """

    model: str
    prompts: str
    max_new_tokens: int
    seed: int
    sampling: SamplingParams
    dtype: str
    template_date: str | None = None


def begun_on(path: pathlib.Path) -> str | None:
    """Returns the date that the prompts of a file of answers have, today for a new one.

    Gone on with on another day, a template with a clock must not write another one.
    """
    try:
        beside = path.with_name(path.name + ".job.json")
        return json.loads(beside.read_text(encoding="utf-8")).get("template_date")
    except (OSError, ValueError, AttributeError):
        return datetime.date.today().isoformat()


class Sample(NamedTuple):
    """An answer.

    Attributes:
        encoded: What was asked.
        text: The answer, without the token that ended it.
        finished: Whether a token ended it, and not the limit.
    """

    encoded: Encoded
    text: str
    finished: bool

    def record(self) -> dict[str, Any]:
        """Returns what is written: a record that training reads, and its number."""
        prompt = self.encoded.prompt
        about = {"number": prompt.number, "finished": self.finished}
        return {**prompt.answered(self.text), **about}


class SampleFile:
    """A file of samples, one line each, that can be gone on with.

    Beside it lies what decides its answers, `NAME.job.json`, so that it is continued
    with nothing else.

    Args:
        path: Of the file.
        job: What decides the answers.
        overwrite: Begin anew where there is a file.

    Attributes:
        done: Number of the first prompt that was not looked at yet.

    Raises:
        SettingsError: If there is a file that this job did not write.
    """

    def __init__(self, path: pathlib.Path, job: Job, *, overwrite: bool):
        self._path = path
        wanted = dataclasses.asdict(job)
        beside = path.with_name(path.name + ".job.json")
        self.done = 0
        if path.exists() and not overwrite:
            try:
                found = json.loads(beside.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                found = {}
            differences = [
                f"{name}: the file has {found.get(name)!r}, now {wanted[name]!r}"
                for name in wanted
                if found.get(name) != wanted[name]
            ]
            if differences:
                raise SettingsError(
                    f"output: {path} holds other answers:\n  "
                    + "\n  ".join(differences)
                    + "\nchoose another --output, or write it anew by --overwrite"
                )
            self.done = self._cut_back()
            return
        try:
            path.write_text("", encoding="utf-8")
            beside.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"output: cannot write {path}: {error}") from error

    def _cut_back(self) -> int:
        """Cuts a last line off that was not written to its end."""
        whole = self._path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            self._path.write_bytes(kept)
        lines = kept.splitlines()
        return json.loads(lines[-1])["number"] + 1 if lines else 0

    def write(self, samples: Sequence[Sample]) -> int:
        """Appends samples, and hands them to the operating system at once.

        Returns:
            How many: one without text is left out, as nothing could be learned of it.
        """
        lines = [
            json.dumps(sample.record(), ensure_ascii=False) + "\n"
            for sample in samples
            if sample.text.strip()
        ]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
        return len(lines)


def choose_fitting(
    encoded: Sequence[Encoded], config: DecoderConfig, max_new_tokens: int
) -> list[Encoded]:
    """Returns the prompts that leave room for an answer in the model's context.

    Raises:
        DataError: If none does.
    """
    room = config.max_position_embeddings - max_new_tokens
    fitting = [one for one in encoded if 0 < len(one.ids) <= room]
    if not fitting:
        shortest = min(len(one.ids) for one in encoded)
        raise DataError(
            f"no prompt leaves room for an answer of {max_new_tokens} tokens: the "
            f"shortest has {shortest} and the model's context is "
            f"{config.max_position_embeddings}; ask for shorter answers"
        )
    return fitting


def answer_prompts(
    model: LoadedModel,
    encoded: Sequence[Encoded],
    job: Job,
    *,
    batch_size: int,
    mesh: Mesh,
) -> Iterator[list[Sample]]:
    """Yields the model's answers to prompts, a batch at a time, in order.

    What is drawn for a prompt depends on the seed and its number, not on its batch, so
    that answers are the same however often the work was cut off.

    Args:
        model: With its tokenizer; its parameters lie on the mesh.
        encoded: The prompts; each leaves room for an answer.
        job: How they are answered.
        batch_size: Prompts that are answered at once.
        mesh: Where batches go.
    """
    tokenizer = cast(Any, model.tokenizer)
    ends = answer_ends(model)
    room = model.config.max_position_embeddings - job.max_new_tokens
    unroll = None if mesh.size == 1 else False
    prepared = prepare(model.params, model.config, unroll=unroll)
    for first in range(0, len(encoded), batch_size):
        batch = encoded[first : first + batch_size]
        longest = max(len(one.ids) for one in batch)
        width = min(-(-longest // _WIDTH) * _WIDTH, room)
        # The last batch repeats prompts, so that all have one shape.
        rows = [batch[row % len(batch)] for row in range(batch_size)]
        ids, mask = pad_left([one.ids for one in rows], width)
        numbers = jnp.array([one.prompt.number for one in rows])
        seed = jax.random.key(job.seed)
        placed = place_batch({"ids": ids, "mask": mask}, mesh)
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
        samples = []
        for row, one in enumerate(batch):
            said = tokens[row, : lengths[row]].tolist()
            finished = said[-1] in ends
            kept = said[:-1] if finished else said
            exact = {"clean_up_tokenization_spaces": False}
            text = str(tokenizer.decode(kept, skip_special_tokens=True, **exact))
            samples.append(Sample(one, text, finished))
        yield samples


def answer_ends(model: LoadedModel) -> tuple[int, ...]:
    """Returns the tokens that end an answer of the model."""
    return end_ids(cast(Any, model.tokenizer), model.generation)
