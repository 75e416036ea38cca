"""What is asked of a preparation; no library is imported for it."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from taid_jax._fields import Checked, need, setting
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
class PrepareOptions(Checked):
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
    validation_data: str | None = setting(None, instead_of=("validation_split",))
    held_out_fraction: float = setting(0.1, ge=0, lt=1)
    validation_limit: int | None = setting(None, ge=1)
    max_tokens: int = setting(2048, ge=2)
    max_prompt: int | None = setting(None, ge=1)
    max_answer: int | None = setting(None, ge=1)
    train_on_prompts: bool = False
    merge_system: bool = False
    template_date: str | None = None
    max_record_bytes: int = setting(MAX_RECORD_BYTES, ge=1)
    seed: int = setting(0, ge=0, lt=2**63)
    shard_tokens: int = setting(16_000_000, ge=1)
    jobs: int = setting(0, ge=0)

    def __post_init__(self):
        super().__post_init__()
        date = self.template_date
        need("template_date", date, date is None or is_date(date), "a date, YYYY-MM-DD")

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
