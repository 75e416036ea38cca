"""Records to examples that fit, each of the others with what is wrong with it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from taid_jax.data.chat import ChatRenderer
from taid_jax.data.documents import Chat, Content, Document, Text, make_document
from taid_jax.data.errors import RecordError
from taid_jax.data.records import Record
from taid_jax.data.teacher_field import TeacherField
from taid_jax.data.teacher_prompt import TeacherPrompt, align
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
        teacher: Of all that the teacher sees; any number when None.
    """

    tokens: int
    prompt: int | None = None
    answer: int | None = None
    teacher: int | None = None


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
    teacher_prompt: TeacherPrompt | None = None,
) -> Iterator[tuple[str, Document | RecordError]]:
    """Yields where each record stands and what it says, or why that cannot be known."""
    also = fields_read(teacher_prompt, teacher_field)
    for origin, record in records:
        try:
            if isinstance(record, RecordError):
                raise record
            document = make_document(record, seed, prompts_suffice=prompts_suffice)
            unused = tuple(key for key in document.unused_keys if key not in also)
            document = document._replace(unused_keys=unused)
            if teacher_prompt is not None:
                content = document.content
                asks = prompts_suffice and isinstance(content, Chat) and content.asks
                seen = teacher_prompt.apply(record, content, asks=asks)  # pyright: ignore
                document = document._replace(teacher=seen)
            if teacher_field is not None:
                document = document._replace(teacher_weights=teacher_field.read(record))
            yield origin, document
        except RecordError as error:
            yield origin, error


def fields_read(
    teacher_prompt: TeacherPrompt | None, teacher_field: TeacherField | None
) -> tuple[str, ...]:
    """Returns the keys of records that are read for the teachers alone."""
    fields = () if teacher_prompt is None else teacher_prompt.fields
    return fields if teacher_field is None else (*fields, teacher_field.key)


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
            characters += sum(len(each.text) for each in rendered)
            if len(group) >= _GROUP_DOCUMENTS or characters >= _GROUP_CHARACTERS:
                yield from self._encode(group)
                group, characters = [], 0
        yield from self._encode(group)

    def _render(self, outcome: Outcome) -> tuple[Outcome, Sequence[Rendered]]:
        """Returns the outcome, and what is encoded where there is no error yet.

        What the teacher sees comes second, where it is something else.
        """
        document = outcome.document
        if isinstance(document, RecordError):
            return outcome._replace(error=document), ()
        sides = [document.content]
        if document.teacher is not None:
            sides.append(document.teacher)
        try:
            rendered = [*map(self._rendered, sides)]
        except RecordError as error:
            keys = document.unused_keys
            return outcome._replace(error=error, unused_keys=keys), ()
        keys = (*document.unused_keys, *rendered[0].unused_keys)
        return outcome._replace(unused_keys=keys), rendered

    def _rendered(self, content: Content) -> Rendered:
        match content:
            case Chat() if self._prompts_suffice and content.asks:
                return self._renderer.prompt(content)
            case Chat():
                return self._renderer.chat(content)
            case Text(text):
                if not text.strip():
                    raise RecordError("empty", "white space only")
                return Rendered(text, counts_all=True, framed=True)

    def _encode(
        self, group: Sequence[tuple[Outcome, Sequence[Rendered]]]
    ) -> Iterator[Outcome]:
        texts = [each for _, rendered in group for each in rendered]
        encoded = iter(self._encoder.examples(texts))
        for outcome, rendered in group:
            examples = [next(encoded) for _ in rendered]
            yield self._fit(outcome, examples) if examples else outcome

    def _fit(
        self, outcome: Outcome, examples: Sequence[Example | RecordError]
    ) -> Outcome:
        """Returns the outcome with the example, its windows, or why there are none."""
        example, seen = examples[0], examples[-1]
        if len(examples) > 1 and not isinstance(example, RecordError):
            # What is wrong with the teacher's is told as if it were the student's.
            whole = not isinstance(seen, RecordError)
            example = align(example, seen) if whole else seen
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
        if example.teacher is not None:
            sizes["teacher_too_long"] = (len(example.teacher.ids), limits.teacher)
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
