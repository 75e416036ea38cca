"""What is asked of a preparation; no library is imported for it."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from taid_jax.data.errors import DataError
from taid_jax.settings import is_date

MAX_RECORD_BYTES = 4_000_000
"""A record above it is no conversation that a model could be trained on, and would hold
up the tokenizer: 4 MB are about a million tokens."""

# HuggingFaceH4/ultrachat_200k as TAID's published code uses it: its splits of
# supervised fine-tuning; conversations up to these lengths; prompts count too.
ULTRACHAT: Mapping[str, Any] = {
    "data": "HuggingFaceH4/ultrachat_200k",
    "split": "train_sft",
    "validation_split": "test_sft",
    "max_tokens": 2048,
    "max_prompt": 1536,
    "max_answer": 512,
    "validation_limit": 2000,
    "train_on_prompts": True,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {"ultrachat": ULTRACHAT}

# They change how the work is shared out, and not a byte of what comes out.
_FREE = frozenset({"output", "jobs"})


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """What is prepared, and how.

    Attributes:
        data: A file of records (.jsonl, .json, .csv, .parquet, .arrow), a folder of
            them, or the name of a data set of the Hugging Face hub, such as
            HuggingFaceH4/ultrachat_200k.
        output: Folder for the shards and manifest.json.
        split: Split of the data set; of a folder, how its files' names begin. Where
            there are several, `train` by default.
        validation_split: The split that is validated on.
        validation_data: A file, folder or data set that is validated on.
        held_out_fraction: Share of the documents that is validated on, where neither
            of the two is given.
        validation_limit: At most so many conversations are validated on.
        max_tokens: Of a conversation; of a window of text.
        max_prompt: Tokens before the last answer.
        max_answer: Tokens of the last answer.
        train_on_prompts: Also train on prompts and other roles' turns.
        merge_system: Put a system turn that the chat template refuses before the first
            turn of the user.
        template_date: What chat templates take for today, such as 2026-01-31; the day
            when the preparation began by default.
        max_record_bytes: Records above it are left out unread.
        seed: Of the shuffle and of what is held out.
        shard_tokens: Tokens of a shard, about.
        jobs: Processes; all cores when 0.
    """

    data: str
    output: str
    split: str | None = None
    validation_split: str | None = None
    validation_data: str | None = None
    held_out_fraction: float = 0.1
    validation_limit: int | None = None
    max_tokens: int = 2048
    max_prompt: int | None = None
    max_answer: int | None = None
    train_on_prompts: bool = False
    merge_system: bool = False
    template_date: str | None = None
    max_record_bytes: int = MAX_RECORD_BYTES
    seed: int = 0
    shard_tokens: int = 16_000_000
    jobs: int = 0

    def __post_init__(self):
        _need("data", self.data, bool(self.data), "a file, a folder or a data set")
        _need("output", self.output, bool(self.output), "a folder")
        _need("max_tokens", self.max_tokens, self.max_tokens >= 2, ">= 2")
        for name in ("max_prompt", "max_answer", "validation_limit"):
            value = getattr(self, name)
            _need(name, value, value is None or value >= 1, ">= 1")
        for name in ("max_record_bytes", "shard_tokens"):
            _need(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        date = self.template_date
        _need("template_date", date, date is None or is_date(date), "YYYY-MM-DD")
        _need("seed", self.seed, 0 <= self.seed < 2**63, "0 <= seed < 2**63")
        _need("jobs", self.jobs, self.jobs >= 0, ">= 0")
        fraction = self.held_out_fraction
        _need("held_out_fraction", fraction, 0 <= fraction < 1, "0 <= fraction < 1")
        if self.validation_split and self.validation_data:
            raise DataError(
                "validation_split and validation_data both say what is validated on; "
                "give one"
            )

    @property
    def workers(self) -> int:
        """How many processes take part."""
        if hasattr(os, "sched_getaffinity"):  # Linux
            return self.jobs or len(os.sched_getaffinity(0))
        return self.jobs or os.cpu_count() or 1

    def lasting(self) -> dict[str, Any]:
        """Returns those that decide what comes out, by name."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _FREE
        }


def _need(name: str, value: object, holds: bool, what: str) -> None:
    if not holds:
        raise DataError(f"{name}: need {what}, got {value!r}")
