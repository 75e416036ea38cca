"""Held-out text token by token: where the student differs from its teacher, and how."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32

from taid_jax.data import Dataset
from taid_jax.data.batches import held_out_iterator
from taid_jax.loss import ForwardKL
from taid_jax.models.files.tokenizer import Tokenizer
from taid_jax.models.files.vocabulary import count_tokens
from taid_jax.sharding import activations_on, batch_part, batch_rows, place_batch
from taid_jax.sharding import replicated as on_all
from taid_jax.train.step import next_token_labels, paired_logits
from taid_jax.types import Batch, ModelFunctions, Params

ROWS, TOKENS, TOP = 4, 512, 5
"""So many held-out rows are looked at, so many tokens of each, and of each prediction
so many of the most probable tokens."""

_ENTRIES = 2**24
"""Logits of a model that are built at once."""


class TokenKL(NamedTuple):
    """What two models say at every position of a batch about the token after it.

    Attributes:
        input_ids: `(batch, length)`, the tokens.
        labels: `(batch, length)`, the token that follows; -100 where none counts.
        kl: `(batch, length)`, KL(teacher || student), nats.
        teacher: `(batch, length)`, the probability that the teacher gives the label.
        student: The same of the student.
        teacher_ids: `(batch, length, TOP)`, its most probable tokens.
        teacher_probs: `(batch, length, TOP)`, their probabilities.
        student_ids: As the teacher's.
        student_probs: As the teacher's.
    """

    input_ids: Int32[Array, "batch length"]
    labels: Int32[Array, "batch length"]
    kl: Float32[Array, "batch length"]
    teacher: Float32[Array, "batch length"]
    student: Float32[Array, "batch length"]
    teacher_ids: Int32[Array, "batch length top"]
    teacher_probs: Float32[Array, "batch length top"]
    student_ids: Int32[Array, "batch length top"]
    student_probs: Float32[Array, "batch length top"]


def make_token_kl(
    student: ModelFunctions, teacher: ModelFunctions, vocab_size: int, mesh: Mesh
) -> Callable[[Params, Params, Batch], TokenKL]:
    """Returns the jitted `(params, teacher_params, batch) -> TokenKL`, on all devices.

    The logits of a few positions exist at a time, never those of a whole batch.

    Args:
        student: Functions of the student: hidden states and head.
        teacher: The same of the teacher, or of what is stored of it.
        vocab_size: Entries of a row of logits.
        mesh: Where the batch lies.
    """
    top = min(TOP, vocab_size)

    def compare(params: Params, teacher_params: Params, batch: Batch) -> TokenKL:
        labels = next_token_labels(batch)
        with activations_on(mesh):
            outputs = (
                student.hidden(params, batch),  # pyright: ignore
                teacher.hidden(teacher_params, batch),  # pyright: ignore
            )
        heads = student.head(params), teacher.head(teacher_params)  # pyright: ignore

        def position(at: tuple[Any, Array]) -> tuple[Array, ...]:
            (of_student, of_teacher), label = at
            logits = paired_logits(of_student, heads[0], of_teacher, heads[1])
            found = [ForwardKL().metrics(*logits)["kl_teacher"]]
            known = jnp.expand_dims(jnp.maximum(label, 0), -1)
            for row in logits[::-1]:
                logprobs = jax.nn.log_softmax(row)
                said = jnp.take_along_axis(logprobs, known, axis=-1)
                # Not sliced: XLA would sort whole rows on a CPU.
                values, ids = jax.lax.top_k(logprobs, top)
                found += [jnp.exp(jnp.squeeze(said, -1)), ids, jnp.exp(values)]
            return tuple(found)

        size, length = labels.shape
        by_position = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (outputs, labels))
        at_once = min(length, max(1, _ENTRIES // (size * vocab_size)))
        found = jax.lax.map(position, by_position, batch_size=at_once)
        kl, p, p_ids, p_top, q, q_ids, q_top = (jnp.swapaxes(x, 0, 1) for x in found)
        ids = jnp.asarray(batch["input_ids"])
        return TokenKL(ids, labels, kl, p, q, p_ids, p_top, q_ids, q_top)

    return jax.jit(compare, out_shardings=on_all(mesh))


def held_out_token_kl(
    compare: Callable[[Params, Params, Batch], TokenKL],
    params: Params,
    teacher_params: Params,
    dataset: Dataset,
    mesh: Mesh,
) -> list[TokenKL]:
    """Returns what is found of the first held-out rows, one batch after the other.

    All processes have to call it, and get the rows of all.
    """
    part, parts = batch_part(mesh)
    size = batch_rows(mesh)
    batches = held_out_iterator(
        dataset.held_out,
        size,
        limit=math.ceil(ROWS / size),
        process_index=part,
        process_count=parts,
    )
    found = (compare(params, teacher_params, place_batch(b, mesh)) for b in batches)
    return [jax.tree.map(np.asarray, each) for each in found]


Token = list[Any]
"""`[text, KL, teacher's probability, student's, teacher's most probable, student's]`,
the last two as `[[text, probability], ...]`; the text alone where none was counted."""


def tokens_of_rows(found: list[TokenKL], tokenizer: Tokenizer) -> list[list[Token]]:
    """Returns the tokens of the rows that have one that counts, as JSON can hold them.

    Args:
        found: Of a few batches.
        tokenizer: Of both models.
    """
    pieces = _Pieces(tokenizer)
    rows: list[list[Token]] = []
    for batch in found:
        for at in range(len(batch.labels)):
            row = jax.tree.map(lambda x, at=at: x[at], batch)
            counted = np.flatnonzero(row.labels >= 0)
            if len(rows) == ROWS or not len(counted):
                continue
            # What follows the last token that counts is padding, or a prompt's rest.
            stop = min(int(counted[-1]) + 2, TOKENS)
            rows.append([_token(row, n, pieces) for n in range(stop)])
    return rows


def _token(row: TokenKL, number: int, pieces: "_Pieces") -> Token:
    ids = row.input_ids.tolist()
    before = ids[number - 1] if number else None
    if before is None or row.labels[number - 1] < 0:
        return [pieces(before, ids[number])]
    said = number - 1

    def top(names: Any, probs: Any) -> list[list[Any]]:
        pairs = zip(names[said].tolist(), probs[said].tolist(), strict=True)
        return [[pieces(before, name), _short(prob)] for name, prob in pairs]

    return [
        pieces(before, ids[number]),
        *(_short(float(x[said])) for x in (row.kl, row.teacher, row.student)),
        top(row.teacher_ids, row.teacher_probs),
        top(row.student_ids, row.student_probs),
    ]


def _short(value: float) -> float:
    """Returns four significant digits, which are all that is shown."""
    return float(f"{value:.4g}")


class _Pieces:
    """The text of a token after another: alone some lose the space before a word."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._size = tokenizer, count_tokens(tokenizer)
        self._known: dict[tuple[int | None, int], str] = {}

    def __call__(self, before: int | None, token: int) -> str:
        key = (before, token)
        if key not in self._known:
            self._known[key] = self._find(*key)
        return self._known[key]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _find(self, before: int | None, token: int) -> str:
        if token >= self._size:
            return f"<{token}>"
        lead = [] if before is None or before >= self._size else [before]
        start, whole = self._decode(lead), self._decode([*lead, token])
        text = whole.removeprefix(start) if whole.startswith(start) else ""
        if text and "\ufffd" not in text:
            return text
        # A part of a character, or nothing: by the name that the vocabulary has for it.
        return str(self._tokenizer.convert_ids_to_tokens(token) or f"<{token}>")
