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
        data, samples = self.data, self.samples
        sampler, size, length = samples.sampler, data.batch_size, data.seq_len
        if sampler != "none":
            what = "--no-pack, as each row has to be one prompt and its answer"
            need("sampler", sampler, not data.pack, what)
            what = "no --buckets beside it: the student's answers are of one length"
            need("sampler", sampler, not data.buckets, what)
            tokens, capacity = samples.sample_tokens, samples.buffer_capacity
            what = f"fewer than seq_len, which is {length}, so that prompts have room"
            need("sample_tokens", tokens, tokens < length, what)
            what = f"at least batch_size, which is {size}"
            need("buffer_capacity", capacity, capacity >= size, what)
        rate, decay = self.optimizer.learning_rate, self.optimizer.weight_decay
        what = f"at most 1 / learning_rate, which is {1 / rate:g}"
        need("weight_decay", decay, rate * decay <= 1, what)
        parts = self.optimizer.grad_accum
        what = f"a divisor of batch_size, which is {size}"
        need("grad_accum", parts, size % parts == 0, what)
        warmup, steps = self.optimizer.warmup_steps, self.run.steps
        need("warmup_steps", warmup, warmup < steps, f"fewer than steps, {steps}")
