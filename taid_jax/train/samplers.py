"""Batches of what the student itself writes, in place of what the data say."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from taid_jax.data import Dataset, ExampleSet, pad_left
from taid_jax.data.packing import make_table
from taid_jax.data.tokens import Example
from taid_jax.models.files.tokenizer import Tokenizer
from taid_jax.settings import SampleSettings, Settings, SettingsError
from taid_jax.sharding import batch_part
from taid_jax.train.answer_rows import AnswerRows, NumpyBatch, make_answer_rows
from taid_jax.train.answers import end_ids, find_questions
from taid_jax.train.inputs import Pair
from taid_jax.train.replay import ReplayBuffer
from taid_jax.train.sampler_rules import Plan, Threshold, plan_adaptive, plan_mixed
from taid_jax.types import IGNORE_INDEX, Params

_PATIENCE = 256
"""So many rows without a prompt that has room are no accident."""

_LOOKED_AT = 64
"""Training examples whose answers show how the chat template ends one."""


class Sampler:
    """Turns batches of the data into what a step trains on.

    All draws come from the seed and the number of the step, so that they are the same
    on all processes and after a resume. Every process holds the whole buffer.

    Args:
        settings: With a sampler other than `none`.
        examples: The training side of the data: how its rows become batches.
        answer_rows: From `make_answer_rows`.
        batch_size: Rows of a batch, over all processes.
        steps: Steps of the whole run.
        seed: Of the draws.
        process_index: This process.
        process_count: How many share the batch.

    Attributes:
        buffer: Answers that were given.
        threshold: Of the `adaptive` sampler.
        plan: Of the last step.
    """

    def __init__(
        self,
        settings: SampleSettings,
        examples: ExampleSet,
        answer_rows: AnswerRows,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._settings, self._examples = settings, examples
        self._answer_rows = answer_rows
        self._batch_size, self._steps, self._seed = batch_size, steps, seed
        size = batch_size // process_count
        self._part = slice(process_index * size, (process_index + 1) * size)
        self._width = examples.seq_len - settings.sample_tokens
        self._looked_at = self._asked = 0
        self.buffer = ReplayBuffer(settings.buffer_capacity)
        self.threshold = Threshold()
        self.plan: Plan | None = None

    def batch(
        self, batch: Mapping[str, np.ndarray], params: Params, step: int
    ) -> NumpyBatch:
        """Returns the batch that a step trains on.

        Args:
            batch: This process's rows of the data, with `prompt_lengths`.
            params: The student's parameters before the step.
            step: Its number, from 1.

        Returns:
            Rows of this process, with the keys of the data without those of prompts.

        Raises:
            SettingsError: If no prompt leaves room for an answer.
        """
        rows = dict(batch)
        prompts = rows.pop("prompt_lengths")
        rows.pop("answer_ends", None)
        rng = np.random.default_rng((self._seed, step))
        self.plan = self._decide(rng.random(), step)
        answers: list[Example] = []
        if self.plan.answer:
            answers = self._answers(rows, prompts, params, step)
            self.buffer.add(answers)
        if self.plan.train_on == "data":
            return rows
        if self.plan.train_on == "buffer":
            answers = self.buffer.draw(rng, min(self._batch_size, len(self.buffer)))
        return self._as_batch(answers)

    def _decide(self, draw: float, step: int) -> Plan:
        if self._settings.sampler == "mixed":
            return plan_mixed(draw, self._settings.mixed_rate)
        return plan_adaptive(
            draw,
            threshold=self.threshold.value,
            progress=(step - 1) / self._steps,
            full=self.buffer.full,
        )

    def metrics(self) -> dict[str, Array]:
        """Returns what a line of metrics says of the sampler after a step."""
        on_answers = self.plan is not None and self.plan.train_on != "data"
        return {
            "student_samples": jnp.float32(on_answers),
            "replay_buffer": jnp.float32(len(self.buffer)),
            "sample_threshold": jnp.float32(self.threshold.value),
        }

    def observe(self, loss: float) -> None:
        """Hears of the loss of a held-out evaluation."""
        if self._settings.sampler == "adaptive":
            self.threshold = self.threshold.after(loss, self._settings.adaptive_step)

    def get_state(self) -> dict[str, Any]:
        """Returns the buffer and the threshold, as JSON values."""
        return {
            "buffer": self.buffer.get_state(),
            "threshold": self.threshold.value,
            "loss": self.threshold.loss,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `get_state` gave."""
        self.buffer.set_state(state["buffer"])
        self.threshold = Threshold(state["threshold"], state["loss"])

    def _answers(
        self, rows: NumpyBatch, prompts: np.ndarray, params: Params, step: int
    ) -> list[Example]:
        """Returns the prompts of all processes with the student's answers.

        A row whose prompt leaves no room for an answer, or that has none, stays as the
        data have it.
        """
        padded = _prompt_rows(rows, prompts, self._width, self._examples.seq_len)
        found = self._answer_rows(params, padded, step)
        asked = found["asked"][:, 0]
        self._looked_at += len(asked)
        self._asked += int(np.count_nonzero(asked))
        if not self._asked and self._looked_at >= _PATIENCE:
            raise SettingsError(
                f"sample_tokens: of {self._looked_at} rows none has a prompt that "
                f"leaves room for an answer of {self._settings.sample_tokens} tokens "
                f"in seq_len, which is {self._examples.seq_len}; set sample_tokens "
                "lower or seq_len higher"
            )
        examples = []
        for row, length in enumerate(asked.tolist()):
            ids = found["input_ids"][row]
            counted = found["labels"][row] != IGNORE_INDEX
            if length:
                new = found["tokens"][row, : found["lengths"][row]]
                ids = np.concatenate([ids[:length], new])
                told = np.ones(len(new), np.bool_)
                counted = np.concatenate([counted[:length], told])
            else:
                length = int(found["attention_mask"][row].sum())
                ids, counted = ids[:length], counted[:length]
            if length:  # The last batch of an epoch may have empty rows.
                examples.append(Example(ids.astype(np.int32), counted))
        return examples

    def _as_batch(self, examples: Sequence[Example]) -> NumpyBatch:
        """Returns this process's rows of a batch that holds these examples."""
        longest = max(len(example.ids) for example in examples)
        lengths = self._examples.buckets or (self._examples.seq_len,)
        rows = dataclasses.replace(
            self._examples,
            table=make_table(enumerate(examples)),
            rows=[(number,) for number in range(len(examples))],
        )
        return rows.batch(
            range(len(examples))[self._part],
            self._part.stop - self._part.start,
            next(length for length in lengths if length >= longest),
        )


def _prompt_rows(
    rows: NumpyBatch, prompts: np.ndarray, width: int, seq_len: int
) -> NumpyBatch:
    """Returns rows of one shape, whatever the batch's, with their prompts on the right.

    `prompt_ids` and `prompt_mask` are `(rows, width)`, padded on the left; `asked`,
    `(rows, 1)`, is the length of a prompt that fits, else 0. A row that is not asked
    gets a prompt of a single token, as every row needs one.
    """
    wider = ((0, 0), (0, seq_len - rows["input_ids"].shape[1]))
    padding = {"labels": IGNORE_INDEX}
    out = {
        name: np.pad(rows[name], wider, constant_values=padding.get(name, 0))
        for name in ("input_ids", "labels", "attention_mask")
    }
    asked = np.where(prompts <= width, prompts, 0)
    used = np.maximum(asked, 1).tolist()
    ids, mask = pad_left(
        [row[:length] for row, length in zip(out["input_ids"], used, strict=True)],
        width,
    )
    asked = asked[:, None].astype(np.int32)
    return out | {"prompt_ids": ids, "prompt_mask": mask, "asked": asked}


def make_sampler(
    settings: Settings, pair: Pair, dataset: Dataset, tokenizer: Tokenizer, mesh: Mesh
) -> Sampler | None:
    """Returns the sampler that the settings ask for; None when they ask for none.

    Args:
        settings: Of the run.
        pair: The student's config and shardings, and how its answers end.
        dataset: Its training side is sampled for.
        tokenizer: Of both models.
        mesh: Where batches go.
    """
    samples, run = settings.samples, settings.run
    if samples.sampler == "none":
        return None
    questions = find_questions(dataset.train, _LOOKED_AT)
    answer_rows = make_answer_rows(
        pair.student_config,
        samples,
        mesh,
        shardings=pair.shardings,
        ends=end_ids(tokenizer, pair.generation, questions),
        dtype=jnp.dtype(settings.model.dtype),
        seed=run.seed,
    )
    part, parts = batch_part(mesh)
    return Sampler(
        samples,
        dataset.train,
        answer_rows,
        batch_size=settings.data.batch_size,
        steps=run.steps,
        seed=run.seed,
        process_index=part,
        process_count=parts,
    )
