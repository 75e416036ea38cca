"""Documents to examples that fit, with a note of every one that is left out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from taid_jax.data.chat import ChatRenderer, MissingTemplateError
from taid_jax.data.documents import Chat, Completion, Content, Document, Text
from taid_jax.data.encoding import Encoder, Rendered, cut_windows
from taid_jax.data.errors import BadRecords, RecordError
from taid_jax.data.tokens import Example

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


class Intake:
    """Renders and encodes documents and leaves out what does not fit.

    Args:
        encoder: With the tokenizer.
        limits: A conversation beyond them is left out: half of one would teach answers
            to unseen questions. Text is cut into windows of `limits.tokens`.
        train_on_prompts: Count every token, not only the assistant's.
        bad: Told of what cannot be used and what is left out.
        merge_system: As `ChatRenderer` has it.
        template_date: As `ChatRenderer` has it.

    Attributes:
        shortest_too_long: Tokens of the shortest conversation that was too long.
    """

    def __init__(
        self,
        encoder: Encoder,
        limits: Limits,
        *,
        train_on_prompts: bool,
        bad: BadRecords,
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
        self._bad = bad
        self.shortest_too_long: int | None = None

    def examples(
        self, documents: Iterable[Document]
    ) -> Iterator[tuple[int, Document, Example]]:
        """Yields examples with their document and its number, in order.

        Raises:
            DataError: If there are conversations and no chat template, or, under the
                policy `raise`, at the first document that cannot be used.
        """
        group: list[tuple[int, Document, Rendered]] = []
        characters = 0
        for number, document in enumerate(documents):
            if isinstance(document.content, Text) and not document.content.text.strip():
                self._bad.leave_out(document.origin, "empty", "white space only")
                continue
            try:
                rendered = self._render(document.content)
            except MissingTemplateError:
                raise
            except RecordError as error:
                self._bad.report(document.origin, error)
                continue
            group.append((number, document, rendered))
            characters += len(rendered.text)
            if len(group) >= _GROUP_DOCUMENTS or characters >= _GROUP_CHARACTERS:
                yield from self._encode(group)
                group, characters = [], 0
        yield from self._encode(group)
        self._bad.unused_keys.update(self._renderer.unused)
        self._renderer.unused.clear()

    def _render(self, content: Content) -> Rendered:
        match content:
            case Text():
                return Rendered(
                    content.text, counts_all=True, framed=True, windowed=True
                )
            case Completion():
                return self._renderer.completion(content)
            case Chat():
                return self._renderer.chat(content)

    def _encode(
        self, group: Sequence[tuple[int, Document, Rendered]]
    ) -> Iterator[tuple[int, Document, Example]]:
        encoded = self._encoder.examples([item for *_, item in group])
        for (number, document, item), example in zip(group, encoded, strict=True):
            if isinstance(example, RecordError):
                self._bad.report(document.origin, example)
                continue
            if item.windowed:
                windows = cut_windows(example, self._limits.tokens)
            else:
                windows = iter([example])
            for window in windows:
                if self._keep(document, window):
                    yield number, document, window

    def _keep(self, document: Document, example: Example) -> bool:
        length, limits = len(example.ids), self._limits
        if isinstance(document.content, Text):
            if length < 2:
                self._bad.leave_out(document.origin, "empty", "a single token")
            return length >= 2
        answer = example.answer_end - example.prompt
        sizes = {
            "too_long": (length, limits.tokens),
            "prompt_too_long": (example.prompt, limits.prompt),
            "answer_too_long": (answer, limits.answer),
        }
        for reason, (size, limit) in sizes.items():
            if limit is not None and size > limit:
                if reason == "too_long":
                    shortest = self.shortest_too_long
                    self.shortest_too_long = min(size, shortest or size)
                detail = f"{size} tokens, the limit is {limit}"
                self._bad.leave_out(document.origin, reason, detail)
                return False
        if not example.counted.any():
            detail = "no token of an answer"
            self._bad.leave_out(document.origin, "nothing_counted", detail)
            return False
        if not example.answer_end and (limits.prompt or limits.answer):
            error = RecordError(
                "answer_not_found",
                "the last answer is not found in what the chat template renders, so "
                "that its length and the prompt's cannot be limited",
            )
            self._bad.report(document.origin, error)
            return False
        return True
