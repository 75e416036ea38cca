"""Settings of the optimizer."""

import dataclasses

from taid_jax.settings.checks import Checked, bounded


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(Checked):
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

    learning_rate: float = bounded(1e-3, gt=0, le=10)
    warmup_steps: int = bounded(0, ge=0)
    weight_decay: float = bounded(0.01, ge=0, le=1e6)
    b1: float = bounded(0.9, ge=0, lt=1)
    b2: float = bounded(0.999, ge=0, lt=1)
    # A second moment below 1e-38 is 0: what is divided by eps alone stays a number.
    eps: float = bounded(1e-8, ge=1e-20)
    clip_norm: float = bounded(1.0, gt=0)
    grad_accum: int = bounded(1, ge=1)
