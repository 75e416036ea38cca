"""Records to examples that fit, each of the others with what is wrong with it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from taid_jax.data.chat import ChatRenderer
from taid_jax.data.documents import Chat, Completion, Document, Text, make_document
from taid_jax.data.errors import RecordError
from taid_jax.data.records import Record
from taid_jax.data.tokens import Encoder, Example, Rendered, cut_windows

_GROUP_DOCUMENTS = 512
_GROUP_CHARACTERS = 4_000_000
"""Documents go to the tokenizer in groups of at most this: enough for it to use its
threads, and little memory."""


class Limits(NamedTuple):
    """The most tokens that a conversation, or a window of text, may have.

    Attributes:
        tokens: Of all of it.
        prompt: Of what comes before the last answer; any number when None.
        answer: Of the last answer; any number when None.
    """

    tokens: int
    prompt: int | None = None
    answer: int | None = None


class Outcome(NamedTuple):
    """What became of a record.

    Attributes:
        origin: Where it stands, such as `chat.jsonl, line 3`.
        document: What it says, or why that cannot be known.
        examples: What is trained on; several windows of a text.
        error: Why there are none.
        tokens: Of all of it, if it could be encoded.
        unused_keys: Those of the record and its messages that change nothing.
    """

    origin: str
    document: Document | RecordError
    examples: Sequence[Example] = ()
    error: RecordError | None = None
    tokens: int = 0
    unused_keys: tuple[str, ...] = ()


def read_documents(
    records: Iterable[tuple[str, Record]], seed: int
) -> Iterator[tuple[str, Document | RecordError]]:
    """Yields where each record stands and what it says, or why that cannot be known.

    Args:
        records: With their places.
        seed: Of the documents' ranks.
    """
    for origin, record in records:
        try:
            if isinstance(record, RecordError):
                raise record
            yield origin, make_document(record, seed)
        except RecordError as error:
            yield origin, error


class Intake:
    """Renders and encodes documents and leaves out what does not fit.

    Args:
        encoder: With the tokenizer.
        limits: A conversation beyond them is left out: half of one would teach answers
            to unseen questions. Text is cut into windows of `limits.tokens`.
        train_on_prompts: Count every token, not only the assistant's.
        merge_system: As `ChatRenderer` has it.
        template_date: As `ChatRenderer` has it.
    """

    def __init__(
        self,
        encoder: Encoder,
        limits: Limits,
        *,
        train_on_prompts: bool,
        merge_system: bool = False,
        template_date: str | None = None,
    ):
        self._encoder = encoder
        self._renderer = ChatRenderer(
            encoder.tokenizer,
            train_on_prompts=train_on_prompts,
            merge_system=merge_system,
            date=template_date,
        )
        self._limits = limits

    def outcomes(
        self, documents: Iterable[tuple[str, Document | RecordError]]
    ) -> Iterator[Outcome]:
        """Yields what became of every document, in order.

        Raises:
            DataError: If there are conversations and no chat template.
        """
        group, characters = [], 0
        for origin, document in documents:
            rendered = self._render(document)
            group.append((origin, document, rendered))
            if isinstance(rendered, Rendered):
                characters += len(rendered.text)
            if len(group) >= _GROUP_DOCUMENTS or characters >= _GROUP_CHARACTERS:
                yield from self._encode(group)
                group, characters = [], 0
        yield from self._encode(group)

    def _render(self, document: Document | RecordError) -> Rendered | RecordError:
        try:
            match document:
                case RecordError():
                    return document
                case Document(Chat() as content):
                    return self._renderer.chat(content)
                case Document(Completion() as content):
                    return self._renderer.completion(content)
                case Document(Text(text)) if text.strip():
                    return Rendered(text, counts_all=True, framed=True)
            return RecordError("empty", "white space only")
        except RecordError as error:
            return error

    def _encode(
        self,
        group: Sequence[tuple[str, Document | RecordError, Rendered | RecordError]],
    ) -> Iterator[Outcome]:
        rendered = [item for *_, item in group if isinstance(item, Rendered)]
        encoded = iter(self._encoder.examples(rendered))
        for origin, document, item in group:
            outcome = Outcome(origin, document)
            if isinstance(document, Document):
                outcome = outcome._replace(unused_keys=document.unused_keys)
            found = item
            if isinstance(item, Rendered):
                keys = (*outcome.unused_keys, *item.unused_keys)
                outcome, found = outcome._replace(unused_keys=keys), next(encoded)
            if isinstance(found, Example):
                yield self._fit(outcome, found)
            else:
                yield outcome._replace(error=found)

    def _fit(self, outcome: Outcome, example: Example) -> Outcome:
        """Returns the outcome with the example, its windows, or why it does not fit."""
        length, limits = len(example.ids), self._limits
        outcome = outcome._replace(tokens=length)
        if isinstance(outcome.document.content, Text):  # pyright: ignore
            if length < 2:
                return outcome._replace(error=RecordError("empty", "a single token"))
            windows = tuple(cut_windows(example, limits.tokens))
            return outcome._replace(examples=windows)
        sizes = {
            "too_long": (length, limits.tokens),
            "prompt_too_long": (example.prompt, limits.prompt),
            "answer_too_long": (example.answer_end - example.prompt, limits.answer),
        }
        for reason, (size, limit) in sizes.items():
            if limit is not None and size > limit:
                message = f"{size} tokens, the limit is {limit}"
                return outcome._replace(error=RecordError(reason, message))
        error = None
        if not example.counted.any():
            error = RecordError("all_masked", "no token of an answer")
        elif not example.answer_end and (limits.prompt or limits.answer):
            error = RecordError(
                "answer_not_found",
                "the last answer is not found in what the chat template renders, so "
                "that its length and the prompt's cannot be limited",
            )
        return outcome._replace(error=error, examples=() if error else (example,))
