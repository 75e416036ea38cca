"""Records to examples that fit, each of the others with what is wrong with it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from taid_jax.data.chat import ChatRenderer
from taid_jax.data.documents import Chat, Document, Text, make_document
from taid_jax.data.errors import RecordError
from taid_jax.data.records import Record
from taid_jax.data.teacher_field import TeacherField
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
    records: Iterable[tuple[str, Record]],
    seed: int,
    *,
    prompts_suffice: bool = False,
    teacher_field: TeacherField | None = None,
) -> Iterator[tuple[str, Document | RecordError]]:
    """Yields where each record stands and what it says, or why that cannot be known.

    Args:
        records: With their places.
        seed: Of the documents' ranks.
        prompts_suffice: As `make_document` has it.
        teacher_field: Says which teachers a record learns from.
    """
    for origin, record in records:
        try:
            if isinstance(record, RecordError):
                raise record
            document = make_document(record, seed, prompts_suffice=prompts_suffice)
            if teacher_field is not None:
                unused = tuple(
                    k for k in document.unused_keys if k != teacher_field.key
                )
                weights = teacher_field.read(record)
                document = document._replace(
                    unused_keys=unused, teacher_weights=weights
                )
            yield origin, document
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
        prompts_suffice: A conversation that ends with a question is a prompt, and need
            not have an answer.
    """

    def __init__(
        self,
        encoder: Encoder,
        limits: Limits,
        *,
        train_on_prompts: bool,
        merge_system: bool = False,
        template_date: str | None = None,
        prompts_suffice: bool = False,
    ):
        self._encoder, self._prompts_suffice = encoder, prompts_suffice
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
            outcome, rendered = self._render(Outcome(origin, document))
            group.append((outcome, rendered))
            characters += len(rendered.text) if rendered is not None else 0
            if len(group) >= _GROUP_DOCUMENTS or characters >= _GROUP_CHARACTERS:
                yield from self._encode(group)
                group, characters = [], 0
        yield from self._encode(group)

    def _render(self, outcome: Outcome) -> tuple[Outcome, Rendered | None]:
        """Returns the outcome, and what is encoded where there is no error yet."""
        document = outcome.document
        if isinstance(document, RecordError):
            return outcome._replace(error=document), None
        try:
            match document.content:
                case Chat() as content if self._prompts_suffice and content.asks:
                    rendered = self._renderer.prompt(content)
                case Chat() as content:
                    rendered = self._renderer.chat(content)
                case Text(text):
                    if not text.strip():
                        raise RecordError("empty", "white space only")
                    rendered = Rendered(text, counts_all=True, framed=True)
        except RecordError as error:
            keys = document.unused_keys
            return outcome._replace(error=error, unused_keys=keys), None
        keys = (*document.unused_keys, *rendered.unused_keys)
        return outcome._replace(unused_keys=keys), rendered

    def _encode(
        self, group: Sequence[tuple[Outcome, Rendered | None]]
    ) -> Iterator[Outcome]:
        texts = [rendered for _, rendered in group if rendered is not None]
        encoded = iter(self._encoder.examples(texts))
        for outcome, rendered in group:
            yield self._fit(outcome, next(encoded)) if rendered else outcome

    def _fit(self, outcome: Outcome, example: Example | RecordError) -> Outcome:
        """Returns the outcome with the example, its windows, or why there are none."""
        if isinstance(example, RecordError):
            return outcome._replace(error=example)
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
        # Nothing has to count in what is only asked.
        if example.prompt < length and not example.counted.any():
            error = RecordError("all_masked", "no token of an answer")
        elif not example.answer_end and (limits.prompt or limits.answer):
            error = RecordError(
                "answer_not_found",
                "the last answer is not found in what the chat template renders, so "
                "that its length and the prompt's cannot be limited",
            )
        return outcome._replace(error=error, examples=() if error else (example,))
