"""Held-out questions, and the student's greedy answers to them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int32

from taid_jax.data import DataError, ExampleSet, held_out_batches
from taid_jax.data import Tokenizer as DataTokenizer
from taid_jax.models.config import DecoderConfig
from taid_jax.models.generate import generate
from taid_jax.models.tokenizer import Tokenizer
from taid_jax.settings import SettingsError
from taid_jax.sharding import batch_part, place_batch
from taid_jax.types import Params

_WIDTH = 32
"""Prompts are padded to a multiple of this."""


class Question(NamedTuple):
    """A prompt and what should follow it.

    Attributes:
        prompt: `(tokens,)` int32, all up to the last answer.
        answer: `(tokens,)` int32, the last answer with the token that ends it.
    """

    prompt: Int32[np.ndarray, " prompt"]
    answer: Int32[np.ndarray, " answer"]


def find_questions(examples: ExampleSet, limit: int) -> list[Question]:
    """Returns the questions in the first rows of a data set.

    A row asks the question of its first example; running text is asked to be gone on
    with from its middle. The order does not depend on anything but the data, and is the
    same on all processes.

    Args:
        examples: Held out.
        limit: At most this many; none are looked for at 0.

    Raises:
        DataError: If there is none.
    """
    questions: list[Question] = []
    # More than are wanted: the last answer is not found in every conversation.
    rows = held_out_batches(examples, 1, limit=2 * limit, with_prompts=True)
    for row in rows if limit else []:
        start, stop = int(row["prompt_lengths"][0]), int(row["answer_ends"][0])
        if 0 < start < stop and len(questions) < limit:
            ids = row["input_ids"][0]
            questions.append(Question(ids[:start], ids[start:stop]))
    if limit and not questions:
        raise DataError(
            "answers cannot be scored: no held-out example has a prompt. Give data "
            "with `prompt` and `completion` or with `messages`, or set answer_examples "
            "to 0"
        )
    return questions


def end_ids(
    tokenizer: Tokenizer,
    generation: Mapping[str, object],
    questions: Sequence[Question] = (),
) -> tuple[int, ...]:
    """Returns the tokens that end an answer, in order.

    The tokenizer's end token, those of the model's generation_config.json, and what the
    chat template ends an answer with, where that is a token not learned from text.
    """
    named = [tokenizer.eos_token_id, generation.get("eos_token_id")]
    known = [n for each in named for n in (each if isinstance(each, list) else [each])]
    # transformers declares this method on its subclasses alone.
    added = set(cast(DataTokenizer, tokenizer).get_added_vocab().values())
    last = {int(question.answer[-1]) for question in questions} & added
    return tuple(sorted(last.union(n for n in known if isinstance(n, int))))


@dataclasses.dataclass(frozen=True)
class Examination:
    """Questions, and what is needed to have them answered.

    Attributes:
        questions: Those that leave room for an answer.
        references: The answers that are wanted, as text.
        tokenizer: Of the student.
        config: Of the student.
        ends: Tokens that end an answer.
        answer_tokens: Tokens of an answer at most.
        batch_size: Questions that are answered at once, over all processes.
        dtype: What the student computes in.
        mesh: Where the questions go.
    """

    questions: Sequence[Question]
    references: tuple[str, ...]
    tokenizer: Tokenizer
    config: DecoderConfig
    ends: tuple[int, ...]
    answer_tokens: int
    batch_size: int
    dtype: str
    mesh: Mesh

    def answers(self, params: Params) -> list[str]:
        """Returns the student's answer to each question, without its end token.

        Args:
            params: The student's parameters; nothing is changed.
        """
        longest = max(len(question.prompt) for question in self.questions)
        room = self.config.max_length - self.answer_tokens
        width = min(-(-longest // _WIDTH) * _WIDTH, room)
        answers: list[str] = []
        for start in range(0, len(self.questions), self.batch_size):
            batch = self._padded(start, width)
            part = place_batch(self._own(batch), self.mesh)
            tokens = generate(
                params,
                self.config,
                part["input_ids"],
                part["attention_mask"],
                max_new_tokens=self.answer_tokens,
                eos_token_ids=self.ends,
                pad_token_id=0,
                dtype=jnp.dtype(self.dtype),
            )
            whole = multihost_utils.process_allgather(tokens, tiled=True)
            answers += [decode(self.tokenizer, row, self.ends) for row in whole]
        return answers[: len(self.questions)]

    def _padded(self, start: int, width: int) -> dict[str, np.ndarray]:
        """Returns prompts with padding on the left; the last batch repeats the first.

        All batches have one shape, so that one program answers them all.
        """
        ids = np.zeros((self.batch_size, width), np.int32)
        mask = np.zeros_like(ids)
        for row in range(self.batch_size):
            prompt = self.questions[(start + row) % len(self.questions)].prompt
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _own(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the rows of this process."""
        part, parts = batch_part(self.mesh)
        size = self.batch_size // parts
        first = part * size
        return {key: value[first : first + size] for key, value in batch.items()}


def prepare_examination(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    config: DecoderConfig,
    generation: Mapping[str, object],
    *,
    answer_tokens: int,
    batch_size: int,
    dtype: str,
    mesh: Mesh,
) -> Examination:
    """Returns the examination of those questions that leave room for an answer.

    Args:
        questions: From `find_questions`.
        tokenizer: Of the student.
        config: Of the student.
        generation: What the teacher's generation_config.json says.
        answer_tokens: Tokens of an answer at most.
        batch_size: Questions that are answered at once, over all processes.
        dtype: What the student computes in.
        mesh: Where the questions go.

    Raises:
        SettingsError: If no question leaves room for an answer in the model's context.
    """
    room = config.max_length - answer_tokens
    fitting = [question for question in questions if len(question.prompt) <= room]
    if not fitting:
        shortest = min(len(question.prompt) for question in questions)
        raise SettingsError(
            f"answer_tokens: {answer_tokens} tokens after a prompt (the shortest has "
            f"{shortest}) do not fit the student's context of {config.max_length}"
        )
    ends = end_ids(tokenizer, generation, fitting)
    return Examination(
        fitting,
        tuple(decode(tokenizer, question.answer, ends) for question in fitting),
        tokenizer,
        config,
        ends,
        answer_tokens,
        batch_size,
        dtype,
        mesh,
    )


def decode(tokenizer: Tokenizer, ids: np.ndarray, ends: Sequence[int]) -> str:
    """Returns the text of the tokens before the first that ends an answer."""
    stops = np.flatnonzero(np.isin(ids, ends))
    kept = ids[: stops[0]] if len(stops) else ids
    return str(tokenizer.decode(kept.tolist(), skip_special_tokens=True)).strip()
