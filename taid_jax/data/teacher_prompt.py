"""Another prompt for the teacher than for the student, with the same answer."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from taid_jax.data.documents import ANSWER_ROLE, Chat, Content, Text, read_turns
from taid_jax.data.errors import RecordError
from taid_jax.data.tokens import Example
from taid_jax.settings import TEMPLATE_FIELD, template_fields


@dataclasses.dataclass(frozen=True)
class TeacherPrompt:
    """What the teacher is asked in place of what the student is asked.

    Attributes:
        text: A template with fields of the record in braces, which takes the place of
            the last turn of the user; or the name of a field, whose value is the whole
            prompt: a text or messages. `{prompt}` is what the student is asked there;
            `{answer}` the last answer, unless the record has a field of this name.
            Doubled braces stand for single ones round a name.
    """

    text: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of records that it takes."""
        return template_fields(self.text) or (self.text,)

    def apply(
        self, record: Mapping[Any, Any], content: Content, *, asks: bool = False
    ) -> Chat:
        """Returns what the teacher sees of a record: its prompt, and the same answer.

        Args:
            record: Of a file.
            content: What the student sees of it.
            asks: Whether all of it is the prompt.

        Raises:
            RecordError: If the record has not what is needed.
        """
        if isinstance(content, Text):
            raise _problem("running text has no prompt, and the teacher is to have one")
        turns = content.messages
        answers = (
            n
            for n, turn in enumerate(turns)
            if turn.role == ANSWER_ROLE and turn.trained
        )
        # All before it is asked; without any there is nothing to align.
        last = len(turns) if asks else max(answers, default=len(turns))
        if not template_fields(self.text):
            value = record.get(self.text)
            if value is None:
                raise _problem(f"the record has no `{self.text}`")
            before = [
                turn._replace(trained=turn.role != ANSWER_ROLE)
                for turn in read_turns(self.text, value, "user")
            ]
            pair = content.is_pair and isinstance(value, str)
            return Chat((*before, *turns[last:]), content.options, pair)
        place = max((n for n in range(last) if turns[n].role == "user"), default=None)
        if place is None:
            raise _problem("the conversation has no turn of the user before its answer")
        said = turns[last].content if last < len(turns) else None
        given = {"answer": said}
        given |= {key: value for key, value in record.items() if value is not None}
        text = self._fill({**given, "prompt": turns[place].content})
        [asked] = read_turns("the teacher's prompt", text, "user")
        asked = turns[place]._replace(content=asked.content)
        return dataclasses.replace(
            content, messages=(*turns[:place], asked, *turns[place + 1 :])
        )

    def _fill(self, values: Mapping[Any, Any]) -> str:
        """Returns the template with values; nothing in them is looked at again."""

        def put(found: re.Match[str]) -> str:
            name = found["name"]
            if name is None:
                return found["literal"]
            value = values.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                has = "no" if value is None else "another value than a text as"
                raise _problem(f"the record has {has} `{name}`")
            return str(value)

        return TEMPLATE_FIELD.sub(put, self.text)


def _problem(message: str) -> RecordError:
    return RecordError("no_teacher_prompt", f"{message} (--teacher-prompt)")


def align(student: Example, teacher: Example) -> Example | RecordError:
    """Returns the student's example with the teacher's, or why they are no pair.

    The tokens that count are the same in both, one by one, in order. Answers before the
    last that the teacher does not see do not count any more.
    """
    mine, theirs = (np.flatnonzero(each.counted) for each in (student, teacher))
    left_out = len(mine) - len(theirs)
    sizes = {each.answer_end - each.prompt for each in (student, teacher)}
    same = left_out >= 0 and len(sizes) == 1
    if not same or np.any(student.ids[mine[left_out:]] != teacher.ids[theirs]):
        return RecordError(
            "answers_differ",
            "behind the teacher's prompt the answer has other tokens than behind the "
            "student's, so that the two cannot be compared token by token: end both "
            "prompts alike, such as with white space or by a chat template",
        )
    counted = student.counted.copy()
    counted[mine[:left_out]] = False
    return student._replace(counted=counted, teacher=teacher)
