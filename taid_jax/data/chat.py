"""Conversations to text, with the characters of every answer."""

import re
from collections.abc import Sequence

import jinja2
import numpy as np

from taid_jax.data.documents import ANSWER_ROLE, Chat, Completion, Message
from taid_jax.data.encoding import Rendered, Span, Tokenizer
from taid_jax.data.errors import DataError, RecordError
from taid_jax.data.tokens import Example

_MARKS_ANSWERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""A template that says itself which tokens the assistant writes."""

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
        self._marked = bool(_MARKS_ANSWERS.search(str(template)))
        # The longest first, so that no token is taken for a shorter one it begins with.
        ends = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._end = re.compile(f" *(?:{'|'.join(map(re.escape, ends))})")

    def completion(self, content: Completion) -> Rendered | Example:
        """Returns a prompt and its completion as one turn each of user and assistant.

        A tokenizer without a chat template (a base model's) gets prompt and completion
        joined as they stand, with start and end tokens.

        Raises:
            RecordError: If the template refuses it.
        """
        if self.has_template:
            user = Message("user", content.prompt)
            return self.chat(Chat((user, Message(ANSWER_ROLE, content.completion))))
        text = content.prompt + content.completion
        answers = (Span(len(content.prompt), len(text)),)
        return Rendered(text, answers, self._count_prompts, framed=True)

    def chat(self, content: Chat) -> Rendered | Example:
        """Returns a conversation as text, or as ids where the template marks answers.

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
        if self._marked:
            return self._encode_marked(messages)
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

    def _encode_marked(self, messages: Sequence[Message]) -> Example:
        encoded = self._apply(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        inside = np.array(encoded["assistant_masks"], np.int8)
        # The last run of marked tokens is the last answer.
        borders = np.flatnonzero(np.diff(inside, prepend=0, append=0))
        prompt, end = borders[-2:].tolist() if len(borders) else (0, 0)
        counted = inside == 1
        if self._count_prompts:
            counted[:] = True
        counted[:1] = False
        return Example(np.array(encoded["input_ids"], np.int32), counted, prompt, end)

    def _render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> str:
        return self._apply(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _apply(self, messages: Sequence[Message], **options: bool):
        try:
            return self._tokenizer.apply_chat_template(
                [message._asdict() for message in messages], **options
            )
        except _RENDER_ERRORS as error:
            raise RecordError(
                "template_refuses",
                f"the chat template refuses this conversation: {error}",
            ) from error
