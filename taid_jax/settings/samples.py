"""Settings of training on what the student itself writes."""

import dataclasses
from typing import Literal

from taid_jax.settings.checks import Checked, bounded, need

SamplerName = Literal["none", "mixed", "adaptive"]


@dataclasses.dataclass(frozen=True)
class SampleSettings(Checked):
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
    buffer_capacity: int = bounded(1000, ge=1)
    mixed_rate: float = bounded(0.5, ge=0, le=1)
    adaptive_step: float = bounded(0.1, ge=0, le=1)
    sample_tokens: int = bounded(128, ge=1)
    sample_temperature: float = bounded(0.0, ge=0)
    sample_top_k: int | None = bounded(None, ge=1)
    sample_top_p: float = bounded(1.0, gt=0, le=1)

    def __post_init__(self):
        super().__post_init__()
        warm = self.sample_temperature
        # Logits divided by less would not be numbers any more.
        need("sample_temperature", warm, warm == 0 or warm >= 1e-6, "0 or >= 1e-06")
        greedy = warm == 0 and (self.sample_top_k is not None or self.sample_top_p < 1)
        need("sample_temperature", warm, not greedy, "> 0 where top_k or top_p is set")
