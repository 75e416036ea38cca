"""Conversations to text, with the characters of every answer."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from taid_jax.data.answers import Answers, Texts, marked_answers, sound
from taid_jax.data.documents import ANSWER_ROLE, OPENING_ROLES, Chat
from taid_jax.data.errors import DataError, RecordError
from taid_jax.data.template import MARK, ChatTemplate, Conversation, Cut
from taid_jax.data.tokens import Rendered, Span, Tokenizer
from taid_jax.errors import shorten, show

_MARKED = "\ue000"
"""An answer that no template writes by itself."""

_MOST_KEYS = 50
"""Each key of a conversation's messages costs a rendering."""


class ChatRenderer:
    """Renders conversations through the tokenizer's chat template.

    An answer runs from the end of the generation prompt to the end of its turn: what a
    model has to write when it is asked. So what the template writes in between counts,
    such as an empty block of thoughts or a call of a tool, and what ends the turn, be
    it a token or text; line ends after it do not.

    Args:
        tokenizer: With its chat template.
        train_on_prompts: Count every token, not only the assistant's.
        merge_system: Put a system turn that the template refuses before the first turn
            of the user.
        date: What templates take for today, `YYYY-MM-DD`; today when None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        train_on_prompts: bool = False,
        merge_system: bool = False,
        date: str | None = None,
    ):
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, date)
        self._train_on_prompts = train_on_prompts
        self._merge_system = merge_system
        self._asks = False
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        # The longest first, so that no token is taken for a shorter one it begins with.
        ends = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, ends)) or r"(?!)")

    def prompt(self, content: Chat) -> Rendered:
        """Returns what a model is given to answer a conversation.

        Raises:
            DataError: If there is no template for a conversation, or it asks for no
                answer.
            RecordError: If the template refuses the conversation.
        """
        all_count = self._train_on_prompts
        if self._is_bare(content):
            text = content.messages[0].content or ""
            return Rendered(text, counts_all=all_count, framed=True, asks=True)

        def rendered(content: Chat) -> Rendered:
            texts = self._texts(content, [Cut(generation=True)])
            return Rendered(
                texts.plain[0],
                counts_all=all_count,
                unused_keys=texts.unused_keys,
                asks=True,
            )

        self._check_asks()

        return self._merging(content, rendered)

    def _check_asks(self) -> None:
        """Looks once whether the template asks for an answer at all.

        Raises:
            DataError: If it begins an answer with more than it ends a prompt with.
        """
        if self._asks or not self.has_template:
            return
        pair = [message.for_template() for message in Chat.pair("a", _MARKED).messages]
        cuts = [Cut(), Cut(1), Cut(1, generation=True)]
        shown = self._template.render(Conversation(pair), cuts)
        whole, bare, asked = (text if isinstance(text, str) else "" for text in shown)
        header = whole.removeprefix(bare).partition(_MARKED)[0].strip()
        written = whole.startswith(bare) and _MARKED in whole
        if bare and bare == asked and written and header:
            raise DataError(
                f"the chat template begins an answer with {show(header)}, but does not "
                "write that when it asks for one: a model would go on with the prompt. "
                "Let it heed add_generation_prompt, or give another by --chat-template"
            )
        self._asks = True

    def chat(self, content: Chat) -> Rendered:
        """Returns a conversation as text, with the characters of its answers.

        A prompt and its completion are a turn each of user and assistant. A tokenizer
        without a chat template (a base model's) gets the two joined as they stand, with
        start and end tokens. So does a prompt that begins with the start token: it was
        rendered before.

        Where prompts count too, only the last answer is looked for, and it is no
        problem if it is not found.

        Raises:
            DataError: If there is no template.
            RecordError: If the template refuses the conversation or leaves a turn out,
                or the answers are not found in what it renders, or nothing ends them.
        """
        if not self._is_bare(content):
            return self._merging(content, self._chat)
        prompt, completion = (turn.content or "" for turn in content.messages)
        text = prompt + completion
        answers = (Span(len(prompt), len(text)),)
        return Rendered(text, answers, self._train_on_prompts, framed=True)

    def _is_bare(self, content: Chat) -> bool:
        """Whether a prompt gets no template."""
        start = getattr(self._tokenizer, "bos_token", None)
        prompt = content.messages[0].content or ""
        rendered = bool(start) and prompt.startswith(start)
        return content.is_pair and (rendered or not self.has_template)

    def _merging(self, content: Chat, render: Callable[[Chat], Rendered]) -> Rendered:
        """Renders a conversation, its system turn put elsewhere if that is asked."""
        if not self.has_template:
            raise DataError(
                "conversations need a chat template and this tokenizer has none; give "
                "one by --chat-template FILE (a Jinja template), or put a "
                "chat_template.jinja (or the key `chat_template` in "
                "tokenizer_config.json) into the model's folder"
            )
        try:
            return render(content)
        except RecordError as error:
            merged = _merged(content)
            refused = error.reason in ("template_refuses", "unknown_role")
            if merged is None or not refused:
                raise
            if self._merge_system:
                return render(merged)
            raise RecordError(
                error.reason,
                f"{error}; --merge-system puts a system turn before the first turn of "
                "the user",
            ) from error

    def _chat(self, content: Chat) -> Rendered:
        every = [n for n, m in enumerate(content.messages) if m.role == ANSWER_ROLE]
        untrained = [turn for turn in every if not content.messages[turn].trained]
        turns = every
        if self._train_on_prompts:
            # Where they are matters for the last, and for those that do not count.
            last = [turn for turn in every if turn not in untrained][-1:]
            turns = sorted([*untrained, *last])
        cuts = [Cut(), *(Cut(turn, generation=True) for turn in turns)]
        texts = self._texts(content, cuts)
        whole = texts.plain[0]
        try:
            if MARK.search(texts.given.template or ""):
                spans, turns = marked_answers(texts, self._template), every
                if untrained and len(spans) != len(every):
                    raise RecordError(
                        "answer_not_found",
                        "the chat template marks other answers than those that have a "
                        "weight",
                    )
            else:
                spans = Answers(
                    content, turns, texts, self._template, self._token
                ).find()
        except RecordError as error:
            if not self._train_on_prompts or untrained or error.reason == "no_end":
                raise
            return Rendered(whole, counts_all=True, unused_keys=texts.unused_keys)
        turned = zip(spans, turns, strict=False)
        masked = tuple(span for span, turn in turned if turn in untrained)
        trained = tuple(span for span in spans if span not in masked)
        if not self._train_on_prompts:
            return Rendered(whole, trained, unused_keys=texts.unused_keys)
        answers = tuple(sorted((*masked, *trained[-1:])))
        return Rendered(
            whole,
            answers,
            counts_all=True,
            untrained=masked,
            unused_keys=texts.unused_keys,
        )

    def _texts(self, content: Chat, cuts: Sequence[Cut]) -> Texts:
        """Renders a conversation.

        Raises:
            RecordError: If the template refuses the conversation, or does not write a
                turn or the calls of tools.
        """
        messages = [message.for_template() for message in content.messages]
        options = dict(content.options)
        given = Conversation(messages, options, self._template.text(options))
        plain = [sound(text) for text in self._template.render(given, cuts)]
        for turn, message in enumerate(content.messages, start=1):
            # Every template knows these two; others it may leave out without a word.
            known = message.role in ("user", ANSWER_ROLE)
            if not known and (message.content or "").strip() not in plain[0]:
                raise RecordError(
                    "unknown_role",
                    f"the chat template does not write turn {turn} ({message.role}); "
                    "take the turn out, or give another template by --chat-template",
                )
        keys = dict.fromkeys(key for turn in content.messages for key, _ in turn.others)
        keys = [*keys, *options]
        if len(keys) > _MOST_KEYS:
            raise RecordError(
                "wrong_shape",
                f"{len(keys)} keys beside `role` and `content`; at most {_MOST_KEYS} "
                "can be looked at",
            )
        unused = []
        for key in keys:
            # A template uses what it writes otherwise without. Some keys change only
            # how an answer is asked for.
            less = [{k: v for k, v in turn.items() if k != key} for turn in messages]
            left = {k: v for k, v in options.items() if k != key}
            without = given._replace(messages=less, options=left)
            found = self._template.render(without, [cuts[0], cuts[-1]])
            if found == [plain[0], plain[-1]]:
                unused.append(shorten(key, 80))
        if "tool_calls" in unused:
            # An answer without its calls is another answer.
            raise RecordError(
                "tool_calls_not_written",
                "the chat template does not write the calls of tools; give another by "
                "--chat-template, or take them out",
            )
        return Texts(given, plain, tuple(unused))


def _merged(content: Chat) -> Chat | None:
    """Returns a conversation whose system turns are part of the first of the user."""
    roles = [message.role for message in content.messages]
    count = roles.index("user") if "user" in roles else 0
    opening, user = content.messages[:count], content.messages[count]
    if not opening or any(role not in OPENING_ROLES for role in roles[:count]):
        return None
    said = "\n\n".join(message.content or "" for message in (*opening, user))
    rest = content.messages[count + 1 :]
    return dataclasses.replace(content, messages=(user._replace(content=said), *rest))
