"""The error of data that cannot be used, and what one bad record does to a run."""

from collections import Counter
from collections.abc import Mapping
from typing import Literal, NamedTuple

from taid_jax.errors import InputError

BadRecordPolicy = Literal["raise", "count"]

REASONS: Mapping[str, str] = {
    "not_utf8": "bytes that are not UTF-8, or half of a surrogate pair",
    "not_json": "a line that is not JSON",
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
}
"""Why a record cannot be used."""

FILTERS: Mapping[str, str] = {
    "too_long": "more tokens than a row holds",
    "prompt_too_long": "more tokens before the last answer than the limit",
    "answer_too_long": "more tokens in the last answer than the limit",
    "empty": "white space only, or a single token",
    "nothing_counted": "no token of an answer",
    "copy": "the same record, under the same name, as one before it",
    "beyond_limit": "validation conversations beyond the number asked for",
}
"""Why a sound record is left out."""

_KEPT_MESSAGES = 20
"""So many problems are kept word for word; the rest are only counted."""


class DataError(InputError):
    """Data, or a setting of it, that cannot be used; the message names the place."""


class RecordError(DataError):
    """One record that cannot be used; the others can.

    Args:
        reason: A key of `REASONS`.
        message: What was needed, what came and the way out, without the place.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Problem(NamedTuple):
    """A record that is left out.

    Attributes:
        origin: Where it stands, such as `chat.jsonl, line 3`.
        reason: A key of `REASONS` or `FILTERS`.
        message: What was needed, what came and the way out.
    """

    origin: str
    reason: str
    message: str


class BadRecords:
    """Ends the run at the first bad record, or counts it and lets the rest go on.

    Sound records that a filter leaves out are counted under either policy.

    Args:
        policy: `raise` or `count`.
        kept: How many are kept in `problems`; all when None.
        filtered: Whether those that a filter leaves out are among them.

    Attributes:
        policy: `raise` or `count`.
        reasons: How many records were left out, by reason.
        problems: The first of them, in order.
        unused_keys: How many records had each key that changed nothing.
        skipped_files: The files of a folder that were passed over.
        notes: What else is to be said of the source, such as which split was taken.
    """

    def __init__(
        self,
        policy: BadRecordPolicy = "raise",
        *,
        kept: int | None = _KEPT_MESSAGES,
        filtered: bool = False,
    ):
        self.policy: BadRecordPolicy = policy
        self.reasons: Counter[str] = Counter()
        self.problems: list[Problem] = []
        self.unused_keys: Counter[str] = Counter()
        self.skipped_files: list[str] = []
        self.notes: list[str] = []
        self._kept = kept
        self._filtered = filtered

    @property
    def count(self) -> int:
        """How many records could not be used, filters left aside."""
        return sum(n for reason, n in self.reasons.items() if reason in REASONS)

    @property
    def messages(self) -> list[str]:
        """The first problems, each with its file and line."""
        return [f"{problem.origin}: {problem.message}" for problem in self.problems]

    def report(self, origin: str, error: RecordError) -> None:
        """Takes note of a record that cannot be used.

        Args:
            origin: Where it stands, such as `chat.jsonl, line 3`.
            error: What is wrong with it.

        Raises:
            DataError: Under the policy `raise`.
        """
        if self.policy == "raise":
            raise DataError(f"{origin}: {error}") from error
        self._note(Problem(origin, error.reason, str(error)))

    def leave_out(self, origin: str, reason: str, detail: str) -> None:
        """Takes note of a sound record that is left out.

        Args:
            origin: Where it stands.
            reason: A key of `FILTERS`.
            detail: What kept it out.
        """
        self._note(Problem(origin, reason, detail), keep=self._filtered)

    def _note(self, problem: Problem, *, keep: bool = True) -> None:
        self.reasons[problem.reason] += 1
        if keep and (self._kept is None or len(self.problems) < self._kept):
            self.problems.append(problem)
