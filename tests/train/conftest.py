import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

VOCAB, WIDTH = 23, 8


def _params(seed: int, width: int = WIDTH):
    rng = np.random.default_rng(seed)
    return {
        "embed": {"embedding": jnp.asarray(rng.normal(size=(VOCAB, width)), "float32")},
        "mix": {
            "kernel": jnp.asarray(rng.normal(size=(width, width)), "float32"),
            "bias": jnp.zeros(width),
        },
        "lm_head": {"kernel": jnp.asarray(rng.normal(size=(width, VOCAB)), "float32")},
    }


@functools.cache
def _functions():
    # Imported late: the annotation checks have to be installed first.
    from taid_jax.types import Head, ModelFunctions

    def hidden(params, batch):
        x = jnp.take(params["embed"]["embedding"], batch["input_ids"], axis=0)
        bias = params["mix"]["bias"].reshape(1, 1, -1)
        return x + jnp.tanh(x @ params["mix"]["kernel"] + bias)

    def head(params):
        return Head(params["lm_head"]["kernel"])

    return ModelFunctions(hidden=hidden, head=head)


class Told:
    """Progress that remembers what it was shown."""

    def __init__(self):
        self.rows, self.evaluations, self.lines = [], [], []

    def step(self, row):
        self.rows.append(row)

    def evaluation(self, row):
        self.evaluations.append(row["step"])

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def told():
    return Told


@pytest.fixture
def make_params():
    """Random weights of a bigram model: embedding, one tanh layer, head."""
    return _params


@pytest.fixture
def functions():
    """Its functions for the train step."""
    return _functions()


@pytest.fixture
def make_batch():
    """`make_batch(seed, batch, length)`: random ids, labels with about a third out."""

    def make(seed: int, batch: int = 8, length: int = 6):
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, VOCAB, (batch, length)).astype(np.int32)
        labels = np.where(rng.random(ids.shape) < 0.35, -100, ids).astype(np.int32)
        return {"input_ids": ids, "labels": labels}

    return make


@functools.cache
def _taid_step(steps, rate, **options):
    """TAID's step, compiled once for all tests of this folder."""
    from taid_jax import loss
    from taid_jax.schedule import TAIDScheduler
    from taid_jax.train.state import learning_rate_schedule, make_optimizer
    from taid_jax.train.step import make_train_step

    rate = learning_rate_schedule(rate, steps)
    return make_train_step(
        _functions(),
        _functions(),
        make_objective=lambda schedule, learned, step: loss.TAID(schedule.t),
        scheduler=TAIDScheduler(steps, alpha=5e-3, beta=0.9),
        optimizer=make_optimizer(rate),
        learning_rate=rate,
        **options,
    )


@pytest.fixture
def make_trainer(functions, make_params):
    """A step and its first state for an objective, by default TAID.

    `optimizer` is one of optax, or settings of `make_optimizer`.
    """
    from taid_jax.schedule import TAIDScheduler
    from taid_jax.train.state import init_state, learning_rate_schedule, make_optimizer
    from taid_jax.train.step import make_train_step

    def make(
        make_objective=None,
        *,
        steps=12,
        rate=1e-2,
        seed=1,
        learned=None,
        optimizer=None,
        **options,
    ):
        shared = not (make_objective or optimizer)
        schedule = learning_rate_schedule(rate, steps)
        if not isinstance(optimizer, optax.GradientTransformation):
            optimizer = make_optimizer(schedule, **optimizer or {})
        scheduler = TAIDScheduler(steps, alpha=5e-3, beta=0.9)
        make_state = functools.partial(
            init_state,
            optimizer=optimizer,
            schedule=scheduler.init(),
            learned=learned,
            averaged="teacher_ema" in options,
        )
        state = make_state(jax.tree.map(jnp.array, make_params(seed)))
        if shared:
            return _taid_step(steps, rate, **options), state
        step = make_train_step(
            functions,
            functions,
            make_objective=make_objective,
            scheduler=scheduler,
            optimizer=optimizer,
            learning_rate=schedule,
            **options,
        )
        return step, state

    return make
