"""Distils an NNX teacher into an NNX student with this project's train step.

Each model is split once into a plain dict of parameters and the functions that the step
calls; the models here offer logits alone, and forward KL is the objective.
"""

import jax
import numpy as np
from flax import nnx

from taid_jax.loss import ForwardKL
from taid_jax.schedule import TAIDScheduler
from taid_jax.train import (
    init_state,
    make_optimizer,
    make_train_step,
    nnx_functions,
)

VOCAB, STEPS = 64, 200


class Model(nnx.Module):
    """A model of pairs of tokens: logits from the token before."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        self.mix = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, VOCAB, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits, `(batch, length, VOCAB)`."""
        return self.head(nnx.gelu(self.mix(self.embed(tokens))))


def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns token ids, and labels aligned with them; -100 would not be counted."""
    ids = rng.integers(0, VOCAB, (8, 32)).astype(np.int32)
    return {"input_ids": ids, "labels": ids}


def main() -> tuple[float, float]:
    """Trains and returns KL to the teacher, before and after."""
    rng = np.random.default_rng(0)
    teacher_params, teacher = nnx_functions(Model(48, nnx.Rngs(1)))
    # Larger weights stand in for training: a teacher that is sure of something.
    teacher_params = jax.tree.map(lambda leaf: 3 * leaf, teacher_params)
    student_params, student = nnx_functions(Model(16, nnx.Rngs(2)))
    # Its t is not used by forward KL; any state of a schedule will do.
    scheduler = TAIDScheduler(STEPS)
    optimizer = make_optimizer(1e-2)
    step = make_train_step(
        student,
        teacher,
        make_objective=lambda schedule, learned, index: ForwardKL(),
        scheduler=scheduler,
        optimizer=optimizer,
    )
    state = init_state(student_params, optimizer=optimizer, schedule=scheduler.init())
    kls = []
    for _ in range(STEPS):
        state, metrics = step(state, teacher_params, batch(rng))
        kls.append(float(metrics["kl_teacher"]))
    print(f"KL {kls[0]:.3f} -> {kls[-1]:.3f} nats")
    return kls[0], kls[-1]


if __name__ == "__main__":
    main()
