"""Settings of the optimizer."""

import dataclasses
import math

from taid_jax.settings.checks import need


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
        need("learning_rate", rate, 0 < rate <= 10, "0 < learning_rate <= 10")
        need("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, ">= 0")
        decay = self.weight_decay
        need("weight_decay", decay, math.isfinite(decay) and decay >= 0, ">= 0")
        need("b1", self.b1, 0 <= self.b1 < 1, "0 <= b1 < 1")
        need("b2", self.b2, 0 <= self.b2 < 1, "0 <= b2 < 1")
        need("eps", self.eps, math.isfinite(self.eps) and self.eps > 0, "> 0")
        clip = self.clip_norm
        need("clip_norm", clip, math.isfinite(clip) and clip > 0, "> 0")
        need("grad_accum", self.grad_accum, self.grad_accum >= 1, ">= 1")
