"""The error of data that cannot be used, and what one bad record does to a run."""

from typing import Literal

BadRecordPolicy = Literal["raise", "count"]

_KEPT_MESSAGES = 20
"""So many problems are kept word for word; the rest are only counted."""


class DataError(ValueError):
    """Data, or a setting of it, that cannot be used.

    The message is one paragraph that names the place and says what was needed, what
    came and the way out: the script prints it without a traceback.
    """


class BadRecords:
    """Ends the run at the first bad record, or counts it and lets the rest go on.

    Attributes:
        policy: `raise` or `count`.
        count: How many records were bad.
        messages: The first of their problems, each with its file and line.
    """

    def __init__(self, policy: BadRecordPolicy = "raise"):
        self.policy: BadRecordPolicy = policy
        self.count = 0
        self.messages: list[str] = []

    def report(self, origin: str, problem: str) -> None:
        """Takes note of a record that cannot be used.

        Args:
            origin: Where it stands, such as `chat.jsonl, line 3`.
            problem: What was needed, what came and the way out.

        Raises:
            DataError: Under the policy `raise`.
        """
        message = f"{origin}: {problem}"
        if self.policy == "raise":
            raise DataError(message)
        self.count += 1
        if len(self.messages) < _KEPT_MESSAGES:
            self.messages.append(message)
