"""The settings of a run: one frozen tree, checked when it is made."""

import dataclasses
from dataclasses import field

from taid_jax.settings.checks import need
from taid_jax.settings.data import DataSettings
from taid_jax.settings.hosts import HostSettings
from taid_jax.settings.judge import JudgeSettings
from taid_jax.settings.model import ModelSettings
from taid_jax.settings.objective import ObjectiveSettings
from taid_jax.settings.optimizer import OptimizerSettings
from taid_jax.settings.run import RunSettings
from taid_jax.settings.samples import SampleSettings


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run.

    Attributes:
        model: Which models, and how they are held.
        data: What is read and how it becomes batches.
        objective: What the student is taught by.
        samples: Training on what the student itself writes.
        optimizer: How its weights move.
        judge: What decides which checkpoint is the best.
        run: How long, where, and what is kept.
        hosts: How several processes become one run.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    samples: SampleSettings = field(default_factory=SampleSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    run: RunSettings = field(default_factory=RunSettings)
    hosts: HostSettings = field(default_factory=HostSettings)

    def __post_init__(self):
        data = self.data
        self.samples.check(
            batch_size=data.batch_size, seq_len=data.seq_len, pack=data.pack
        )
        sampler, buckets = self.samples.sampler, data.buckets
        need(
            "sampler",
            sampler,
            sampler == "none" or not buckets,
            "no --buckets beside it: the student's answers are of one length",
        )
        parts, size = self.optimizer.grad_accum, self.data.batch_size
        need(
            "grad_accum",
            parts,
            size % parts == 0,
            f"a divisor of batch_size, which is {size}",
        )
        warmup, steps = self.optimizer.warmup_steps, self.run.steps
        need("warmup_steps", warmup, warmup < steps, f"fewer than steps, {steps}")
