"""Conversations to text, with the characters of every answer."""

import re
from collections.abc import Sequence

import jinja2

from taid_jax.data.documents import ANSWER_ROLE, Chat, Completion, Message
from taid_jax.data.encoding import Rendered, Span, Tokenizer, is_rendered
from taid_jax.data.errors import DataError, RecordError

_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
"""What a template has round all that the assistant writes, where it says so itself."""

_PRIVATE = range(0xE000, 0xF8FF)
"""Characters that mean nothing in Unicode, to be told apart from a conversation's."""

_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)


class MissingTemplateError(DataError):
    """There are conversations, and the tokenizer has no chat template."""

    def __init__(self):
        super().__init__(
            "conversations need a chat template and this tokenizer has none; give one "
            "by --chat-template FILE (a Jinja template), or put a chat_template.jinja "
            "(or the key `chat_template` in tokenizer_config.json) into the model's "
            "folder"
        )


class ChatRenderer:
    """Renders conversations through the tokenizer's chat template.

    An answer runs from the end of the generation prompt to the end of what the
    assistant says, together with the token that ends the turn: what a model has to
    write when it is asked. Line ends that the template puts after it do not count.
    """

    def __init__(self, tokenizer: Tokenizer, *, count_prompts: bool):
        self._tokenizer = tokenizer
        self._count_prompts = count_prompts
        template = getattr(tokenizer, "chat_template", None)
        self.has_template = bool(template)
        if isinstance(template, dict):
            template = template.get("default")
        self._marked = template if template and _MARK.search(template) else None
        # The longest first, so that no token is taken for a shorter one it begins with.
        ends = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._end = re.compile(f" *(?:{'|'.join(map(re.escape, ends))})")

    def completion(self, content: Completion) -> Rendered:
        """Returns a prompt and its completion as one turn each of user and assistant.

        A tokenizer without a chat template (a base model's) gets prompt and completion
        joined as they stand, with start and end tokens. So does a prompt that begins
        with the start token: it was rendered before.

        Raises:
            RecordError: If the template refuses it.
        """
        if self.has_template and not is_rendered(self._tokenizer, content.prompt):
            user = Message("user", content.prompt)
            return self.chat(Chat((user, Message(ANSWER_ROLE, content.completion))))
        text = content.prompt + content.completion
        answers = (Span(len(content.prompt), len(text)),)
        return Rendered(text, answers, self._count_prompts, framed=True)

    def chat(self, content: Chat) -> Rendered:
        """Returns a conversation as text, with the characters of its answers.

        Where prompts count too, only the last answer is looked for, and it is no
        problem if it is not found.

        Raises:
            MissingTemplateError: If there is no template.
            RecordError: If the template refuses the conversation or leaves a turn out,
                or the answers are not found in what it renders.
        """
        if not self.has_template:
            raise MissingTemplateError()
        messages = content.messages
        whole = self._render(messages)
        for turn, message in enumerate(messages, start=1):
            # Every template knows these two; others it may silently leave out.
            known = message.role in ("user", ANSWER_ROLE)
            if not known and message.content.strip() not in whole:
                raise RecordError(
                    "unknown_role",
                    f"the chat template does not write turn {turn} ({message.role}); "
                    "take the turn out, or give another template by --chat-template",
                )
        if self._marked is not None:
            spans = self._marked_answers(whole, messages, self._marked)
            kept = spans[-1:] if self._count_prompts else spans
            return Rendered(whole, kept, counts_all=self._count_prompts)
        turns = [n for n, message in enumerate(messages) if message.role == ANSWER_ROLE]
        if not self._count_prompts:
            spans = [self._find_answer(whole, messages, turn) for turn in turns]
            return Rendered(whole, tuple(spans))
        try:
            last = (self._find_answer(whole, messages, turns[-1]),)
        except RecordError:
            last = None
        return Rendered(whole, last, counts_all=True)

    def _find_answer(self, whole: str, messages: Sequence[Message], turn: int) -> Span:
        before = self._render(messages[:turn], add_generation_prompt=True)
        said = messages[turn].content
        problem = RecordError(
            "answer_not_found",
            f"the answer in turn {turn + 1} is not found where the chat template asks "
            "for it; mark answers in the template with {% generation %} ... "
            "{% endgeneration %}, or count prompts too",
        )
        if not whole.startswith(before):
            raise problem
        start = len(before)
        # Templates may trim an answer, and may put a space before it.
        if whole.startswith(said, start):
            stop = start + len(said)
        else:
            trimmed = said.strip()
            space = len(whole) - start - len(whole[start:].lstrip())
            if not whole.startswith(trimmed, start + space):
                raise problem
            stop = start + space + len(trimmed)
        end = self._end.match(whole, stop)
        return Span(start, end.end() if end else stop)

    def _marked_answers(
        self, whole: str, messages: Sequence[Message], template: str
    ) -> tuple[Span, ...]:
        """Returns the characters that the template marks as the assistant's.

        Each mark is replaced by a character that the conversation does not have. Which
        tokens they are is left to the encoder and its proof: the masks that
        `transformers` makes count a token of which one character is an answer's.
        """
        free = (chr(code) for code in _PRIVATE if chr(code) not in whole)
        start, stop = next(free), next(free)

        def show(mark: re.Match[str]) -> str:
            # A block, as the mark is, so that white space round it is treated alike.
            left, end, right = mark.groups()
            character = stop if end else start
            return f"{{%{left} if true %}}{character}{{% endif {right}%}}"

        shown = self._apply(
            messages, tokenize=False, chat_template=_MARK.sub(show, template)
        )
        spans: list[Span] = []
        place = 0
        for piece in re.split(f"([{start}{stop}])", shown):
            if piece == start:
                spans.append(Span(place, place))
            elif piece == stop:
                spans[-1] = spans[-1]._replace(stop=place)
            else:
                place += len(piece)
        if re.sub(f"[{start}{stop}]", "", shown) != whole:
            raise RecordError(
                "answer_not_found",
                "the chat template marks answers in a way that changes what it renders",
            )
        return tuple(span for span in spans if span.start < span.stop)

    def _render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> str:
        return self._apply(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _apply(self, messages: Sequence[Message], **options: bool | str):
        try:
            return self._tokenizer.apply_chat_template(
                [message._asdict() for message in messages], **options
            )
        except _RENDER_ERRORS as error:
            raise RecordError(
                "template_refuses",
                f"the chat template refuses this conversation: {error}",
            ) from error
