"""Distils a Linen teacher into a Linen student with this project's train step.

Both models are the user's own. The step needs two functions of each: hidden states and
head, so that the logits of a batch are never built.
"""

import flax.linen as nn
import jax
import numpy as np

from taid_jax.loss import TAID, Head
from taid_jax.schedule import TAIDScheduler
from taid_jax.train import (
    init_state,
    learning_rate_schedule,
    linen_functions,
    make_optimizer,
    make_train_step,
)

VOCAB, STEPS = 64, 200


class Model(nn.Module):
    """A model of pairs of tokens: hidden states from the token before."""

    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the last hidden states, `(batch, length, width)`."""
        hidden = nn.Embed(VOCAB, self.width, name="embed")(tokens)
        hidden = nn.gelu(nn.Dense(self.width, name="mix")(hidden))
        # The head is a parameter, applied by the loss.
        self.param("head", nn.initializers.lecun_normal(), (self.width, VOCAB))
        return hidden


def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns token ids, and labels aligned with them; -100 would not be counted."""
    ids = rng.integers(0, VOCAB, (8, 32)).astype(np.int32)
    return {"input_ids": ids, "labels": ids}


def main() -> tuple[float, float]:
    """Trains and returns KL to the interpolated teacher, before and after."""
    rng = np.random.default_rng(0)
    teacher, student = Model(48), Model(16)
    tokens = batch(rng)["input_ids"]
    # Larger weights stand in for training: a teacher that is sure of something.
    teacher_params = jax.tree.map(
        lambda leaf: 3 * leaf, teacher.init(jax.random.key(1), tokens)["params"]
    )
    student_params = student.init(jax.random.key(2), tokens)["params"]

    scheduler = TAIDScheduler(STEPS)
    learning_rate = learning_rate_schedule(1e-2, STEPS)
    optimizer = make_optimizer(learning_rate)
    step = make_train_step(
        linen_functions(student, head=lambda params: Head(params["head"])),
        linen_functions(teacher, head=lambda params: Head(params["head"])),
        make_objective=lambda schedule, learned, index: TAID(schedule.t),
        scheduler=scheduler,
        optimizer=optimizer,
        learning_rate=learning_rate,
    )
    state = init_state(student_params, optimizer=optimizer, schedule=scheduler.init())
    kls = []
    for _ in range(STEPS):
        state, metrics = step(state, teacher_params, batch(rng))
        kls.append(float(metrics["kl_teacher"]))
    print(f"KL {kls[0]:.3f} -> {kls[-1]:.3f} nats, t = {float(state.schedule.t):.2f}")
    return kls[0], kls[-1]


if __name__ == "__main__":
    main()
