"""Settings of training on what the student itself writes."""

import dataclasses
import math
from typing import Literal

from taid_jax.settings.checks import need

SamplerName = Literal["none", "mixed", "adaptive"]


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Which batches are answers of the student, and how it answers.

    Attributes:
        sampler: `none` trains on the data alone; `mixed` on the student's own answers
            in a fixed share of the steps (GKD); `adaptive` in a share that grows while
            the held-out loss does not fall (DistiLLM). Needs --no-pack.
        buffer_capacity: Answers that are kept to be trained on again; the oldest go.
        mixed_rate: Share of the steps that train on the student's answers (`mixed`).
        adaptive_step: How much the share grows each time (`adaptive`).
        sample_tokens: Tokens of an answer at most. A prompt of more than seq_len minus
            this many tokens is not asked: its row stays as the data have it.
        sample_temperature: Of the student's answers; 0 takes the most probable token.
        sample_top_k: Draw from this many of the most probable tokens; from all by
            default.
        sample_top_p: Draw from the most probable tokens that hold this probability.
    """

    sampler: SamplerName = "none"
    buffer_capacity: int = 1000
    mixed_rate: float = 0.5
    adaptive_step: float = 0.1
    sample_tokens: int = 512
    sample_temperature: float = 0.0
    sample_top_k: int | None = None
    sample_top_p: float = 1.0

    def __post_init__(self):
        names = ("none", "mixed", "adaptive")
        need("sampler", self.sampler, self.sampler in names, f"one of {names}")
        for name in ("buffer_capacity", "sample_tokens"):
            need(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("mixed_rate", "adaptive_step"):
            value = getattr(self, name)
            need(name, value, 0 <= value <= 1, "a share from 0 to 1")
        warm, few = self.sample_temperature, self.sample_top_k
        need("sample_temperature", warm, math.isfinite(warm) and warm >= 0, ">= 0")
        need("sample_top_k", few, few is None or few >= 1, ">= 1")
        mass = self.sample_top_p
        need("sample_top_p", mass, 0 < mass <= 1, "0 < share <= 1")
        greedy = warm == 0 and (few is not None or mass < 1)
        need("sample_temperature", warm, not greedy, "> 0 where top_k or top_p is set")

    def check(self, *, batch_size: int, seq_len: int, pack: bool) -> None:
        """Raises SettingsError where the settings of the data do not allow samples."""
        if self.sampler == "none":
            return
        need(
            "sampler",
            self.sampler,
            not pack,
            "--no-pack, as each row has to be one prompt and its answer",
        )
        tokens, capacity = self.sample_tokens, self.buffer_capacity
        need(
            "sample_tokens",
            tokens,
            tokens < seq_len,
            f"fewer than seq_len, which is {seq_len}, so that prompts have room",
        )
        need(
            "buffer_capacity",
            capacity,
            capacity >= batch_size,
            f"at least batch_size, which is {batch_size}",
        )
