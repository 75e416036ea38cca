"""How far TAID's target has moved from the student to the teacher."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Real

from taid_jax.errors import show


class TAIDState(NamedTuple):
    """The state of a schedule, part of a train state.

    Attributes:
        t: Interpolation for the next step, scalar float32; 0 is the student, 1 the
            teacher.
        prev_loss: Loss of the last step with a finite one, scalar float32; inf before
            the first.
        momentum: Running mean of the relative fall of the loss, scalar float32.

    Examples:
        >>> from taid_jax.schedule import TAIDScheduler
        >>> print(*TAIDScheduler(100).init())
        0.4 inf 0.0
    """

    t: Float[Array, "..."]
    prev_loss: Float[Array, "..."]
    momentum: Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class TAIDScheduler:
    """Moves t from `t_start` to `t_end`, faster than linearly while the loss falls.

    Pure: `update` takes a state and returns the next, under jit, scan and vmap alike.

    Attributes:
        num_train_steps: Optimizer steps from `t_start` to `t_end`, at least 1.
        t_start: t of the first step, in [0, t_end].
        t_end: t of the last step, in [t_start, 1].
        alpha: Size of an adaptive step, at least 0.
        beta: Share of the past in the momentum, in [0, 1).
        disable_adaptive: Follow the line alone.

    Raises:
        TypeError: If a setting is no number, or the steps are no int.
        ValueError: If a setting is out of its range.

    References:
        Shing et al., TAID, ICLR 2025 (arXiv:2501.16937), section 3.3 and algorithm 1.

    Examples:
        >>> from taid_jax.schedule import TAIDScheduler
        >>> scheduler = TAIDScheduler(num_train_steps=10, t_start=0.4)
        >>> state = scheduler.init()
        >>> for step, loss in enumerate([3.0, 2.5, 2.0]):
        ...     state = scheduler.update(state, loss, step)
        >>> print(f"{state.t:.2f}")
        0.52
    """

    num_train_steps: int
    t_start: float | int = 0.4
    t_end: float | int = 1.0
    alpha: float | int = 5e-4
    beta: float | int = 0.99
    disable_adaptive: bool = False

    def __post_init__(self) -> None:
        steps = self.num_train_steps
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
            raise TypeError(f"need an int for num_train_steps, got {show(steps)}")
        for name in ("t_start", "t_end", "alpha", "beta"):
            value = getattr(self, name)
            if not isinstance(value, int | float | np.integer | np.floating | Array):
                raise TypeError(f"need a real number for {name}, got {show(value)}")
        if steps < 1:
            raise ValueError(
                "need num_train_steps >= 1, "
                f"got num_train_steps = {self.num_train_steps}"
            )
        if not 0 <= self.t_start <= self.t_end <= 1:
            raise ValueError(
                "need 0 <= t_start <= t_end <= 1, "
                f"got t_start = {self.t_start}, t_end = {self.t_end}"
            )
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"need alpha >= 0 and finite, got alpha = {self.alpha}")
        # As the float32 that it becomes.
        if not 0 <= np.float32(self.beta) < 1:
            raise ValueError(f"need 0 <= beta < 1, got beta = {self.beta}")

    def init(self) -> TAIDState:
        """Returns the state before the first step: t is `t_start`, no loss seen."""
        return _start(jnp.asarray(self.t_start, jnp.float32))

    def update(
        self,
        state: TAIDState,
        loss: Real[ArrayLike, "..."],
        step: Real[ArrayLike, "..."],
    ) -> TAIDState:
        """Returns the state after an optimizer step; its t is for the next step.

        Args:
            state: The state that the step used.
            loss: The step's distillation loss, the token-weighted mean over the whole
                global batch, in nats. One that is not finite leaves the state as it is.
            step: Index of that step, from 0. Steps past the end are safe; NaN leaves
                the state as it is.
        """
        loss = jnp.asarray(loss, jnp.float32)
        first = jnp.isposinf(state.prev_loss)
        before = jnp.where(first, loss, state.prev_loss)
        # The constant is the published code's, against a loss of 0.
        fall = (before - loss) / (before + 1e-15)
        momentum = self.beta * state.momentum + (1 - self.beta) * fall

        progress = jnp.asarray(step, jnp.float32) / self.num_train_steps
        t = self.t_start + (self.t_end - self.t_start) * progress
        if not self.disable_adaptive:
            delta = self.alpha * jax.nn.sigmoid(momentum) * (1 - state.t)
            t = jnp.maximum(t, state.t + delta)
        # The first loss has nothing to be compared with: it is only remembered.
        t = jnp.where(first, state.t, jnp.minimum(self.t_end, t))
        # Never back, not even where a loop counts its steps anew.
        t = jnp.maximum(state.t, t)
        return _if_finite(loss, TAIDState(t, loss, momentum), state)


@dataclasses.dataclass(frozen=True)
class ScheduledT:
    """Lets any schedule of the step drive t, in the shape of `TAIDScheduler`.

    Attributes:
        schedule: `step -> value`, such as an optax schedule, called with a float32. The
            step of index k runs with its value at k, clipped to [0, 1].

    Examples:
        >>> from taid_jax.schedule import ScheduledT
        >>> scheduler = ScheduledT(lambda step: 0.2 + 0.1 * step)
        >>> state = scheduler.update(scheduler.init(), 3.0, 0)
        >>> print(f"{state.t:.2f}")
        0.30
    """

    schedule: Callable[[Array], ArrayLike]

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise TypeError(
                f"need a callable, step -> t, for schedule, got {show(self.schedule)}"
            )

    def init(self) -> TAIDState:
        """Returns the state before the first step.

        Raises:
            ValueError: If the schedule has NaN there; a traced one cannot be looked at.
        """
        t = self._at(jnp.zeros((), jnp.float32))
        if not isinstance(t, Tracer) and jnp.isnan(t):
            raise ValueError("need a t in [0, 1] at step 0 that is not NaN, got NaN")
        return _start(t)

    def update(
        self,
        state: TAIDState,
        loss: Real[ArrayLike, "..."],
        step: Int[ArrayLike, "..."],
    ) -> TAIDState:
        """Returns the state after an optimizer step; see `TAIDScheduler.update`."""
        loss = jnp.asarray(loss, jnp.float32)
        t = self._at(jnp.asarray(step, jnp.float32) + 1)
        return _if_finite(loss, TAIDState(t, loss, state.momentum), state)

    def _at(self, step: Array) -> Array:
        return jnp.clip(jnp.asarray(self.schedule(step), jnp.float32), 0.0, 1.0)


def _start(t: Float[Array, ""]) -> TAIDState:
    return TAIDState(t, jnp.asarray(jnp.inf, jnp.float32), jnp.zeros((), jnp.float32))


def _if_finite(loss: Array, after: TAIDState, before: TAIDState) -> TAIDState:
    """Returns the state before where the loss, or what came of it, is not finite."""
    seen = jnp.isfinite(loss) & jnp.isfinite(after.t) & jnp.isfinite(after.momentum)
    return TAIDState(
        *(jnp.where(seen, new, old) for new, old in zip(after, before, strict=True))
    )
