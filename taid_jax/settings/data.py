"""Settings of the data."""

import dataclasses
import datetime
import re
from typing import Literal

from taid_jax.settings.checks import Checked, bounded, need


def is_date(text: str) -> bool:
    """Returns whether a text is a date such as 2026-01-31."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class DataSettings(Checked):
    """What is read and how it becomes batches.

    Attributes:
        data: `pydoc` (Python's own documentation), `pydoc-questions` (the same as
            questions and answers), a file of text or of records (.txt, .jsonl, .json,
            .csv, .parquet, .arrow; docs/data.md has the keys) or a folder of them, a
            data set of the Hugging Face hub as OWNER/NAME or OWNER/NAME:SPLIT, or a
            folder that scripts/prepare_data.py has made.
        batch_size: Sequences of one optimizer step, over all devices.
        seq_len: Tokens of one sequence.
        held_out_fraction: Share of the documents that is never trained on.
        held_out_batches: At most this many held-out batches are evaluated.
        train_on_prompts: Also train on prompts and other roles' turns.
        pack: Put several short examples into one sequence, kept apart by segments.
        buckets: Without packing, shorter lengths that batches of short examples have,
            such as 256,512; each is compiled once.
        bad_records: Whether a record that cannot be used is counted and left out, or
            raises, which ends the run.
        chat_template: A Jinja template in place of the teacher's own.
        merge_system: Put a system turn that the chat template refuses before the first
            turn of the user.
        template_date: What chat templates take for today, such as 2026-01-31; the day
            when the run began by default, also when it is resumed.
    """

    data: str = "pydoc"
    batch_size: int = bounded(4, ge=1)
    seq_len: int = bounded(256, ge=2)
    held_out_fraction: float = bounded(0.1, gt=0, lt=1)
    held_out_batches: int = bounded(8, ge=1)
    train_on_prompts: bool = False
    pack: bool = True
    buckets: str = ""
    bad_records: Literal["count", "raise"] = "count"
    chat_template: str | None = None
    merge_system: bool = False
    template_date: str | None = None

    def __post_init__(self):
        super().__post_init__()
        date = self.template_date
        need("template_date", date, date is None or is_date(date), "a date, YYYY-MM-DD")
        tokens = self.batch_size * self.seq_len
        what = "fewer than 2**31 tokens in a batch of batch_size times seq_len"
        need("batch_size", self.batch_size, tokens < 2**31, what)
        lengths = self.bucket_lengths
        need(
            "buckets",
            self.buckets,
            all(1 < length <= self.seq_len for length in lengths),
            f"lengths from 2 to seq_len, which is {self.seq_len}",
        )
        rising = list(lengths) == sorted(set(lengths))
        need("buckets", self.buckets, rising, "rising lengths")
        need(
            "buckets", self.buckets, not (lengths and self.pack), "--no-pack beside it"
        )

    @property
    def bucket_lengths(self) -> tuple[int, ...]:
        """The numbers of `buckets`."""
        parts = self.buckets.split(",") if self.buckets else []
        numbers = all(re.fullmatch(r"\s*[0-9]+\s*", part) for part in parts)
        need("buckets", self.buckets, numbers, "numbers with commas between them")
        return tuple(map(int, parts))
