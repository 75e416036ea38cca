"""Batches of the student's completions in place of those of the data.

References:
    Agarwal et al., GKD, 2023 (arXiv:2306.13649), algorithm 1; Ko et al., DistiLLM, 2024
    (arXiv:2402.03898), section 3.2 and algorithm 1.
"""

import base64
import collections
import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from taid_jax.data import Dataset, ExampleSet, pad_left
from taid_jax.data.packing import make_table
from taid_jax.data.tokens import Example
from taid_jax.models.files.tokenizer import Tokenizer
from taid_jax.models.sampling import SamplingParams
from taid_jax.settings import OnPolicySettings, Settings, SettingsError
from taid_jax.sharding import batch_part
from taid_jax.train.inputs import Pair
from taid_jax.train.on_policy.generation import (
    Complete,
    NumpyBatch,
    make_complete,
    training_ends,
)
from taid_jax.types import IGNORE_INDEX, Params

_PATIENCE = 256
"""So many rows without a prompt that has room are no accident."""


class ReplayBuffer:
    """The newest completions, up to a capacity: the oldest goes for each that comes."""

    def __init__(self, capacity: int):
        self._examples: collections.deque[Example] = collections.deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    @property
    def full(self) -> bool:
        """Whether it holds as many as it can."""
        return len(self._examples) == self._examples.maxlen

    def add(self, examples: Iterable[Example]) -> None:
        """Takes examples in, in order."""
        self._examples.extend(examples)

    def draw(self, rng: np.random.Generator, size: int) -> list[Example]:
        """Returns `size` different examples, all equally probable."""
        places = rng.choice(len(self._examples), size, replace=False)
        return [self._examples[place] for place in places]

    def get_state(self) -> dict[str, Any]:
        """Returns what it holds as JSON values, tokens compressed."""
        # A token's lowest bit says whether it counts.
        tokens = [2 * e.ids.astype("<i8") + e.counted for e in self._examples]
        data = zlib.compress(b"".join(row.tobytes() for row in tokens))
        text = base64.b64encode(data).decode("ascii")
        return {"lengths": [len(row) for row in tokens], "tokens": text}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Holds what `get_state` gave, and nothing else."""
        data = zlib.decompress(base64.b64decode(state["tokens"]))
        tokens = np.frombuffer(data, "<i8")
        ids, counted = (tokens >> 1).astype(np.int32), tokens % 2 == 1
        ends = itertools.accumulate(state["lengths"], initial=0)
        self._examples.clear()
        self._examples.extend(
            Example(ids[start:stop], counted[start:stop])
            for start, stop in itertools.pairwise(ends)
        )


class Plan(NamedTuple):
    """What is done at a step.

    Attributes:
        generate: The student completes the batch's prompts, for the buffer.
        train_on: The batch as the `data` have it, the `new` completions, or a batch
            drawn from the `buffer`.
    """

    generate: bool
    train_on: Literal["data", "new", "buffer"]


def plan_step(
    settings: OnPolicySettings,
    draw: float,
    *,
    threshold: float,
    progress: float,
    full: bool,
) -> Plan:
    """Returns what is done at a step.

    GKD (`mixed`) trains on completions in a fixed share of the steps; DistiLLM
    (`adaptive`) in the share `threshold`, and the further it gets, the fewer of them
    are new.

    Args:
        settings: Which of both.
        draw: Uniform in [0, 1).
        threshold: DistiLLM's share of the steps.
        progress: Steps done before, as a share of all steps.
        full: Whether the buffer is.
    """
    mixed = settings.on_policy == "mixed"
    if draw >= (settings.mixed_rate if mixed else threshold):
        return Plan(generate=False, train_on="data")
    if mixed:
        return Plan(generate=True, train_on="buffer")
    if draw < threshold * (1 - progress) or not full:
        return Plan(generate=True, train_on="new")
    return Plan(generate=False, train_on="buffer")


class OnPolicyBatches:
    """Turns batches of the data into what a step trains on.

    All draws come from the seed and the number of the step, so that they are the same
    on all processes and after a resume. Every process holds the whole buffer.

    Args:
        settings: With `on_policy` other than `none`.
        examples: The training side of the data: how its rows become batches.
        complete: From `make_complete`.
        batch_size: Rows of a batch, over all processes.
        steps: Steps of the whole run.
        seed: Of the draws.
        process_index: This process.
        process_count: How many share the batch.

    Attributes:
        buffer: The completions so far.
        threshold: DistiLLM's share of the steps.
        held_out_loss: The loss that the next one is compared with.
        plan: Of the last step.
    """

    def __init__(
        self,
        settings: OnPolicySettings,
        examples: ExampleSet,
        complete: Complete,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._settings, self._examples = settings, examples
        self._complete = complete
        self._batch_size, self._steps, self._seed = batch_size, steps, seed
        size = batch_size // process_count
        self._part = slice(process_index * size, (process_index + 1) * size)
        self._width = examples.seq_len - settings.completion_tokens
        self._seen = self._completed = 0
        self.buffer = ReplayBuffer(settings.buffer_capacity)
        self.threshold = 0.0
        self.held_out_loss: float | None = None
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
            SettingsError: If no prompt leaves room for a completion.
        """
        rows = dict(batch)
        prompts = rows.pop("prompt_lengths")
        rows.pop("answer_ends", None)
        rng = np.random.default_rng((self._seed, step))
        self.plan = plan_step(
            self._settings,
            rng.random(),
            threshold=self.threshold,
            progress=(step - 1) / self._steps,
            full=self.buffer.full,
        )
        examples: list[Example] = []
        if self.plan.generate:
            examples = self._generate(rows, prompts, params, step)
            self.buffer.add(examples)
        if self.plan.train_on == "data":
            return rows
        if self.plan.train_on == "buffer":
            examples = self.buffer.draw(rng, min(self._batch_size, len(self.buffer)))
        return self._as_batch(examples)

    def metrics(self) -> dict[str, Array]:
        """Returns what a line of metrics says of the last step's batch."""
        on_policy = self.plan is not None and self.plan.train_on != "data"
        return {
            "on_policy": jnp.float32(on_policy),
            "buffer_size": jnp.float32(len(self.buffer)),
            "on_policy_threshold": jnp.float32(self.threshold),
        }

    def observe(self, loss: float) -> None:
        """Moves DistiLLM's threshold by the loss of a held-out evaluation.

        The first loss is stored. A later one that is at or above the stored one raises
        the threshold and takes its place; one that is below changes nothing, nor does
        one that is not finite.
        """
        if self._settings.on_policy != "adaptive" or not math.isfinite(loss):
            return
        if self.held_out_loss is not None:
            if loss < self.held_out_loss:
                return
            self.threshold = min(self.threshold + self._settings.adaptive_step, 1.0)
        self.held_out_loss = loss

    def get_state(self) -> dict[str, Any]:
        """Returns the buffer and the threshold, as JSON values."""
        return {
            "buffer": self.buffer.get_state(),
            "threshold": self.threshold,
            "loss": self.held_out_loss,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `get_state` gave."""
        self.buffer.set_state(state["buffer"])
        self.threshold, self.held_out_loss = state["threshold"], state["loss"]

    def _generate(
        self, rows: NumpyBatch, prompts: np.ndarray, params: Params, step: int
    ) -> list[Example]:
        """Returns the prompts of all processes with the student's completions.

        A row whose prompt leaves no room for one, or that has none, stays as the data
        have it.
        """
        padded = prompt_rows(rows, prompts, self._width, self._examples.seq_len)
        found = self._complete(params, padded, step)
        lengths = found["prompt_lengths"][:, 0]
        self._seen += len(lengths)
        self._completed += int(np.count_nonzero(lengths))
        if not self._completed and self._seen >= _PATIENCE:
            raise SettingsError(
                f"completion_tokens: of {self._seen} rows none has a prompt that "
                f"leaves room for a completion of {self._settings.completion_tokens} "
                f"tokens in seq_len, which is {self._examples.seq_len}; set "
                "completion_tokens lower or seq_len higher"
            )
        examples = []
        for row, length in enumerate(lengths.tolist()):
            new = found["tokens"][row, : found["lengths"][row] if length else 0]
            kept = length or int(found["attention_mask"][row].sum())
            ids = np.concatenate([found["input_ids"][row, :kept], new])
            counted = found["labels"][row, :kept] != IGNORE_INDEX
            counted = np.concatenate([counted, np.ones(len(new), np.bool_)])
            if len(ids):  # The last batch of an epoch may have empty rows.
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


def prompt_rows(
    rows: NumpyBatch, prompts: np.ndarray, width: int, seq_len: int
) -> NumpyBatch:
    """Returns rows of one shape, whatever the batch's, with their prompts beside them.

    `prompt_ids` and `prompt_mask` are `(rows, width)`; `prompt_lengths`, `(rows, 1)`,
    the length of a prompt that fits, else 0: such a row has a prompt of a single token,
    as every row needs one.
    """
    wider = ((0, 0), (0, seq_len - rows["input_ids"].shape[1]))
    padding = {"labels": IGNORE_INDEX}
    out = {
        name: np.pad(rows[name], wider, constant_values=padding.get(name, 0))
        for name in ("input_ids", "labels", "attention_mask")
    }
    fitting = np.where(prompts <= width, prompts, 0).astype(np.int32)
    pairs = zip(out["input_ids"], fitting, strict=True)
    ids, mask = pad_left([row[: max(length, 1)] for row, length in pairs], width)
    return out | {
        "prompt_ids": ids,
        "prompt_mask": mask,
        "prompt_lengths": fitting[:, None],
    }


def make_on_policy(
    settings: Settings, pair: Pair, dataset: Dataset, tokenizer: Tokenizer, mesh: Mesh
) -> OnPolicyBatches | None:
    """Returns the on-policy batches that the settings ask for, None if for none."""
    chosen, run = settings.on_policy, settings.run
    if chosen.on_policy == "none":
        return None
    complete = make_complete(
        pair.student_config,
        mesh,
        shardings=pair.shardings,
        ends=training_ends(tokenizer, pair.generation, dataset),
        max_new_tokens=chosen.completion_tokens,
        dtype=jnp.dtype(settings.model.dtype),
        sampling=SamplingParams(
            chosen.completion_temperature,
            chosen.completion_top_k,
            chosen.completion_top_p,
        ),
        seed=run.seed,
    )
    part, parts = batch_part(mesh)
    return OnPolicyBatches(
        chosen,
        dataset.train,
        complete,
        batch_size=settings.data.batch_size,
        steps=run.steps,
        seed=run.seed,
        process_index=part,
        process_count=parts,
    )
