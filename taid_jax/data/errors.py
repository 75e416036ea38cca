"""The error of data that cannot be used, and what one bad record does to a run."""

from collections import Counter
from collections.abc import Mapping
from typing import Literal, NamedTuple

from taid_jax.errors import InputError

BadRecordPolicy = Literal["raise", "count"]

REASONS: Mapping[str, str] = {
    "not_utf8": "bytes that are not UTF-8, or half of a surrogate pair",
    "not_json": "a line or record that is not JSON",
    "wrong_shape": "other keys or types than a record has",
    "damaged_file": "a file that cannot be read, or not to its end",
    "too_large": "a record above the limit of bytes, never parsed",
    "starts_with_assistant": "a conversation that does not start with the user",
    "empty_turn": "a turn without text",
    "unknown_role": "a role that no chat has, or that the template does not write",
    "no_answer": "a conversation without an assistant turn",
    "template_refuses": "a conversation that the chat template refuses",
    "answer_not_found": "answers whose tokens cannot be told from the prompts'",
    "no_end": "answers that nothing ends in the chat template",
    "tool_calls_not_written": "calls of tools that the chat template does not write",
    "unknown_teacher": "none of the teachers named under the key of `--teacher-field`",
    "no_teacher_prompt": "a record without what the teacher's prompt is made of",
    "answers_differ": "answers of other tokens behind the teacher's prompt",
}
"""Why a record cannot be used."""

FILTERS: Mapping[str, str] = {
    "too_long": "more tokens than a row holds",
    "prompt_too_long": "more tokens before the last answer than the limit",
    "answer_too_long": "more tokens in the last answer than the limit",
    "teacher_too_long": "more tokens than the teacher's row holds (--teacher-seq-len)",
    "empty": "white space only, or a single token",
    "all_masked": "every token masked: no answer is trained on",
    "copy": "the same record, under the same name, as one before it",
    "beyond_limit": "validation conversations beyond the number asked for",
}
"""Why a sound record is left out."""

_NAMED = 20
"""So many problems are kept word for word; the rest are only counted."""


class DataError(InputError):
    """Data, or a setting of it, that cannot be used; the message names the place."""


class RecordError(DataError):
    """One record that is left out; the others are not.

    Args:
        reason: A key of `REASONS` or `FILTERS`.
        message: What was needed, what came and the way out, without the place.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Problem(NamedTuple):
    """A record that is left out: where it stands, the key of its reason, and why."""

    origin: str
    reason: str
    message: str


class LeftOut:
    """Counts what is left out, by reason; or ends the run at the first bad record.

    Sound records that a filter leaves out are counted under either policy.
    """

    def __init__(self, policy: BadRecordPolicy = "raise"):
        self._policy: BadRecordPolicy = policy
        self.reasons: Counter[str] = Counter()
        self.problems: list[Problem] = []

    def add(self, origin: str, error: RecordError) -> None:
        """Takes note of a record that is left out.

        Raises:
            DataError: If it cannot be used, under the policy `raise`.
        """
        unusable = error.reason in REASONS
        if unusable and self._policy == "raise":
            raise DataError(f"{origin}: {error}") from error
        self.reasons[error.reason] += 1
        if unusable and len(self.problems) < _NAMED:
            self.problems.append(Problem(origin, error.reason, str(error)))


def nothing_left(source: str, reasons: Mapping[str, int]) -> str:
    """Returns the beginning of a message about a source without a usable record."""
    counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    return f"{source}: no example is left to train on ({counts or 'no records'})"
