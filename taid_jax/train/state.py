"""The state of a training run, and the optimizer that moves it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int32, PyTree

from taid_jax.schedule import TAIDState
from taid_jax.types import Params


class DistillState(NamedTuple):
    """Everything that changes from step to step, and all that a checkpoint keeps.

    Attributes:
        step: Batches consumed, int32 scalar.
        params: The student's parameters.
        opt_state: The optimizer's state over `(params, learned)`.
        schedule: TAID's t and what its controller remembers.
        learned: What the objective itself learns, such as CTKD's temperature; an empty
            dict for most.
        average: The moving average of the parameters, float32, where that is the
            teacher; else None.
    """

    step: Int32[Array, ""]
    params: Params
    opt_state: PyTree
    schedule: TAIDState
    learned: dict[str, Array]
    average: Params | None = None

    def teacher_of(self, params: Params) -> Params:
        """Returns the teacher's parameters: the average, or else those given."""
        return params if self.average is None else self.average


def init_state(
    params: Params,
    *,
    optimizer: optax.GradientTransformation,
    schedule: TAIDState,
    learned: dict[str, Array] | None = None,
    averaged: bool = False,
) -> DistillState:
    """Returns the state before the first step.

    Args:
        params: The student's parameters.
        optimizer: Any optax optimizer; it sees the pair `(params, learned)`.
        schedule: `TAIDScheduler.init()`.
        learned: What the objective itself learns.
        averaged: Whether the state has the average of the parameters, which begins as
            a copy of them.
    """

    def copy(leaf: Array) -> Array:
        return jnp.array(leaf, jnp.float32)

    learned = {} if learned is None else learned
    return DistillState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init((params, learned)),
        schedule=schedule,
        learned=learned,
        average=jax.tree.map(copy, params) if averaged else None,
    )


def state_shardings(
    state: DistillState,
    params_shardings: Any,
    optimizer: optax.GradientTransformation,
    whole: jax.sharding.Sharding,
) -> DistillState:
    """Returns where each array of a state lives.

    Args:
        state: A state, or its shapes.
        params_shardings: The tree of the parameters' shardings; the optimizer's moments
            and the average go with them.
        optimizer: The one that the state was made with.
        whole: The sharding of everything else.
    """
    everywhere = jax.tree.map(lambda _: whole, state)
    learned = everywhere.learned
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state.opt_state,
        (params_shardings, learned),
        transform_non_params=lambda _: whole,
    )
    average = None if state.average is None else params_shardings
    return everywhere._replace(
        params=params_shardings, opt_state=opt_state, average=average
    )


def move_average(average: Params, params: Params, decay: float) -> Params:
    """Returns `decay * average + (1 - decay) * params`, float32.

    Args:
        average: Of the parameters before, float32.
        params: The parameters after a step.
        decay: Share of the average that is kept, in (0, 1).
    """

    def move(old: Array, new: Array) -> Array:
        # In this form what is equal stays so to the last bit.
        return old + (1 - decay) * (new.astype(jnp.float32) - old)

    return jax.tree.map(move, average, params)


def decay_mask(params: Any) -> Any:
    """Returns which parameters are decayed: not biases, nor the scale beside one.

    A norm with a bias is a LayerNorm, and the published recipe spares it; RMSNorm
    scales, which have none, are decayed. What the objective learns is not.
    """
    student, learned = params

    def mask(node: Any) -> Any:
        if not isinstance(node, dict):
            return True
        norm = "scale" in node and "bias" in node
        return {
            key: mask(child) if isinstance(child, dict) else key != "bias" and not norm
            for key, child in node.items()
        }

    return mask(student), jax.tree.map(lambda _: False, learned)


def learning_rate_schedule(
    learning_rate: float, steps: int, warmup_steps: int = 0
) -> optax.Schedule:
    """Returns a linear warm-up to `learning_rate` and a cosine to 0 at `steps`."""
    if warmup_steps:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, warmup_steps, decay_steps=steps
        )
    else:
        schedule = optax.cosine_decay_schedule(learning_rate, steps)
    # A float count, so that no integer is promoted on the way.
    return lambda count: schedule(jnp.asarray(count, jnp.float32))


def make_optimizer(
    learning_rate: optax.Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Returns AdamW behind a clip of the global norm, as the published recipe has it.

    References:
        Shing et al., TAID, ICLR 2025 (arXiv:2501.16937), appendix on training details.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            learning_rate,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=decay_mask,
        ),
    )


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Returns whether no float of a tree is NaN or infinite."""
    found = [jnp.all(jnp.isfinite(leaf)) for leaf in _floats(tree).values()]
    return jnp.all(jnp.stack(found)) if found else jnp.array(True)


@jax.jit
def _finite_leaves(tree: PyTree) -> dict[str, Array]:
    return {name: jnp.all(jnp.isfinite(x)) for name, x in _floats(tree).items()}


def nonfinite_leaves(tree: PyTree) -> list[str]:
    """Returns the names of the arrays that have NaN or inf in them."""
    found = jax.device_get(_finite_leaves(tree))
    return [name for name, finite in found.items() if not finite]


def _floats(tree: PyTree) -> dict[str, Array]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def updates_applied(opt_state: PyTree) -> Int32[Array, ""] | None:
    """Returns how many updates the learning-rate schedule has seen, if any counts."""

    def counts_rate(path: Any, _: Any) -> bool:
        return any(
            getattr(entry, "tuple_name", "") == "ScaleByScheduleState" for entry in path
        )

    return optax.tree_utils.tree_get(opt_state, "count", None, counts_rate)
