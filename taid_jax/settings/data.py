"""Settings of the data."""

import dataclasses

from taid_jax.settings.checks import need


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What is read and how it becomes batches.

    Attributes:
        data: `pydoc` (Python's own documentation), `pydoc-questions` (the same as
            questions and answers), or a .txt, .jsonl or .parquet file or a folder of
            them, with `text`, `prompt` and `completion`, or `messages`.
        batch_size: Sequences of one optimizer step, over all devices.
        seq_len: Tokens of one sequence.
        held_out_fraction: Share of the documents that is never trained on.
        held_out_batches: At most this many held-out batches are evaluated.
        count_prompts: Also train on prompts and other roles' turns.
        pack: Put several short examples into one sequence, kept apart by segments.
    """

    data: str = "pydoc"
    batch_size: int = 4
    seq_len: int = 256
    held_out_fraction: float = 0.1
    held_out_batches: int = 8
    count_prompts: bool = False
    pack: bool = True

    def __post_init__(self):
        need("data", self.data, bool(self.data), "a file, a folder or 'pydoc'")
        need("batch_size", self.batch_size, self.batch_size >= 1, ">= 1")
        need("seq_len", self.seq_len, self.seq_len >= 2, ">= 2")
        fraction = self.held_out_fraction
        need("held_out_fraction", fraction, 0 < fraction < 1, "0 < fraction < 1")
        batches = self.held_out_batches
        need("held_out_batches", batches, batches >= 1, ">= 1")
