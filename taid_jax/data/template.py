"""Chat templates: from a file, and rendered within limits of time and output."""

import atexit
import contextlib
import datetime
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple, cast

import jinja2

from taid_jax.data.errors import DataError, RecordError
from taid_jax.data.tokens import Tokenizer
from taid_jax.errors import parsing, shorten

MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
"""What a template has round all that the assistant writes, where it says so itself;
Jinja alone does not know it."""

SECONDS = 5.0
"""Of computing for one conversation; a template needs some milliseconds."""

CHARACTERS = 32_000_000
"""That one conversation may become: a record has at most some four million."""

MEMORY = 512 * 2**20
"""Bytes that all templates together may take."""

_PROGRAM = pathlib.Path(__file__).with_name("template_process.py")


def set_chat_template(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Gives a tokenizer the chat template of a file, in place of its own.

    Args:
        tokenizer: Changed in place, so that it is exported with the template.
        path: A Jinja template, as `chat_template.jinja` of a model's folder is.

    Raises:
        DataError: If the file cannot be read, or is not a Jinja template.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"chat_template: {path} is not UTF-8: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"chat_template: {path} cannot be read: {reason}") from error
    if not text.strip():
        raise DataError(f"chat_template: {path} is empty")
    with parsing(f"chat_template: {path} is not a Jinja template", DataError):
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            MARK.sub("", text)
        )
    # Every tokenizer of transformers has it; the protocol cannot name it.
    tokenizer.chat_template = text  # pyright: ignore[reportAttributeAccessIssue]


class Conversation(NamedTuple):
    """What a template is given."""

    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any] = {}
    template: str | None = None


class Cut(NamedTuple):
    """Which messages are rendered: those before `stop`; is an answer asked for?"""

    stop: int | None = None
    generation: bool = False


class TemplateError(DataError):
    """A chat template that no conversation can be rendered with."""


class _Renderer:
    """The one process of this process that templates run in, started when asked."""

    lock = threading.Lock()
    owner = 0
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def ask(cls, request: Mapping[str, Any]) -> list[Any] | int:
        """Returns the answer, or the status that the process ended with over it."""
        line = json.dumps(request, default=placeholder).encode() + b"\n"
        with cls.lock:
            if cls.process is None or cls.owner != os.getpid():
                # A forked process must not read the answers to its parent.
                cls.process, cls.owner = _start_process(), os.getpid()
            answer, status = [], 0
            try:
                with contextlib.suppress(OSError):
                    cast(IO[bytes], cls.process.stdin).write(line)
                    cast(IO[bytes], cls.process.stdin).flush()
                    line = cast(IO[bytes], cls.process.stdout).readline()
                    answer = json.loads(line) if line.endswith(b"\n") else []
            finally:
                # Who is stopped while waiting must not read this answer to the next.
                if not answer or answer[-1][0] == "limit":
                    status = cls._end(cls.process)
            return answer or status

    @classmethod
    def close(cls) -> None:
        """Ends the process; the next request starts another."""
        with cls.lock:
            if cls.process is not None and cls.owner == os.getpid():
                cls._end(cls.process)

    @classmethod
    def _end(cls, process: subprocess.Popen[bytes]) -> int:
        cls.process = None
        # It may have ended with some of a request unread.
        with contextlib.suppress(OSError), process:
            process.terminate()
        return process.returncode


def _start_process() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # Not from the folder of the program, whose modules have names of others.
        [sys.executable, "-P", "-W", "ignore", str(_PROGRAM), str(MEMORY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


atexit.register(_Renderer.close)


def placeholder(value: object) -> str:
    """Returns what `transformers` shows a template of a value that is no JSON."""
    return f"<{type(value).__name__}>"


class ChatTemplate:
    """A tokenizer's chat template, as `transformers` renders it, within limits.

    Args:
        tokenizer: Whose template it is.
        date: What templates take for today, `YYYY-MM-DD`; today when None.
    """

    def __init__(self, tokenizer: Tokenizer, date: str | None = None):
        self._tokenizer = tokenizer
        self._date = date or datetime.date.today().isoformat()
        self._sound: set[str] = set()

    def text(self, options: Mapping[str, Any]) -> str | None:
        """Returns the template, None if there is none; some have another for tools."""
        template = getattr(self._tokenizer, "chat_template", None)
        if not isinstance(template, Mapping):
            return template or None
        named = "tool_use" if options.get("tools") and "tool_use" in template else None
        return template.get(named or "default")

    def render(
        self, conversation: Conversation, cuts: Sequence[Cut]
    ) -> list[str | RecordError]:
        """Returns the text of each cut, or why the template refuses it.

        Raises:
            TemplateError: If the template breaks on the plainest conversation, or does
                not keep within the limits.
        """
        template = conversation.template or self.text(conversation.options)
        if not isinstance(template, str):
            raise TemplateError("the tokenizer's chat template is not text")
        if template not in self._sound:
            self._look_at(template)
        return self._ask(conversation._replace(template=template), cuts)

    def _look_at(self, template: str) -> None:
        """Looks at a template before any record, so that a broken one is told once."""
        system, *turns = (
            {"role": role, "content": role[0]}
            for role in ("system", "user", "assistant")
        )
        found = [
            *self._ask(Conversation(turns, {}, template), [Cut(), Cut(1, True)]),
            *self._ask(Conversation([system, *turns], {}, template), [Cut()]),
        ]
        if all(isinstance(each, _BrokenTemplateError) for each in found):
            raise TemplateError(
                f"the chat template cannot be used: {found[0]}; give another by "
                "--chat-template FILE"
            )
        self._sound.add(template)

    def _ask(
        self, conversation: Conversation, cuts: Sequence[Cut]
    ) -> list[str | RecordError]:
        special = getattr(self._tokenizer, "special_tokens_map", None) or {}
        answer = _Renderer.ask(
            {
                # As transformers does: null is no key at all.
                "messages": [
                    {key: value for key, value in turn.items() if value is not None}
                    for turn in conversation.messages
                ],
                "options": {**special, **conversation.options},
                "template": conversation.template,
                "cuts": cuts,
                "date": self._date,
                "seconds": SECONDS,
                "characters": CHARACTERS,
            }
        )
        if answer == -signal.SIGPROF:
            raise TemplateError(
                f"the chat template was stopped after {SECONDS:g} seconds of computing "
                "for one conversation; give another by --chat-template FILE"
            )
        if isinstance(answer, int):
            raise TemplateError(
                "the process that renders chat templates has ended with status "
                f"{answer}: out of memory, or `transformers` cannot be imported by "
                f"{sys.executable}"
            )
        texts: list[str | RecordError] = []
        for kind, said in answer:
            if kind == "text":
                texts.append(said)
            elif kind == "limit":
                raise TemplateError(
                    f"the chat template {said} for one conversation, and gets "
                    f"{MEMORY:,} bytes for at most {CHARACTERS:,} characters; give "
                    "another by --chat-template FILE"
                )
            else:
                make = RecordError if kind == "refused" else _BrokenTemplateError
                message = (
                    f"the chat template refuses this conversation: {shorten(said)}"
                )
                texts.append(make("template_refuses", message))
        return texts


class _BrokenTemplateError(RecordError):
    """The template fails, other than by saying that it refuses."""
