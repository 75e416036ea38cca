"""How far TAID's target has moved from the student to the teacher."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeVar

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

    watches: ClassVar[str] = "distil_loss"
    """The figure of a step that `update` is given."""

    def __post_init__(self) -> None:
        _check(self, "alpha")
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"need alpha >= 0 and finite, got alpha = {self.alpha}")

    def init(self) -> TAIDState:
        """Returns the state before the first step: t is `t_start`, no loss seen."""
        return TAIDState(
            t=jnp.asarray(self.t_start, jnp.float32),
            prev_loss=jnp.asarray(jnp.inf, jnp.float32),
            momentum=jnp.zeros((), jnp.float32),
        )

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
        return _if_finite(TAIDState(t, loss, momentum), state)


class GapState(NamedTuple):
    """The state of `GapScheduler`, part of a train state.

    Attributes:
        t: Interpolation for the next step, scalar float32.
        mean: Running mean of KL(p_t || student) / t**2, not corrected, scalar float32.
        kl_start: The KL that is kept, in nats, scalar float32.
        num_updates: Steps seen with finite figures, scalar float32.

    Examples:
        >>> from taid_jax.schedule import GapScheduler
        >>> print(*GapScheduler(100).init())
        0.4 0.0 0.0 0.0
    """

    t: Float[Array, "..."]
    mean: Float[Array, "..."]
    kl_start: Float[Array, "..."]
    num_updates: Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class GapScheduler:
    """Moves t so that the target stays as far from the student as it was at first.

    With D the running mean of KL(p_t || student):

        log t' = log t + rate / 2 * (log D_start - log D)

    but t never falls, never passes `t_end`, and goes there in a straight line over the
    last tenth of the steps, so that the last step has `t_end`. D is about t**2 / 2
    times the variance of the difference of the logits; hence the half, and hence the
    mean is one of D / t**2, taken times t**2: what was seen at an older t counts as it
    would be at this one. The mean is corrected for its start at zero, as Adam's.
    `D_start` is the mean after the first 1 / (1 - beta) steps, or the first tenth of
    the steps if those are fewer; until then t stays where it is.

    Attributes:
        num_train_steps: Optimizer steps from `t_start` to `t_end`, at least 1.
        t_start: t of the first steps, in (0, t_end].
        t_end: t of the last step, in [t_start, 1].
        rate: Share of the way to the wanted t in one step, in (0, 1].
        beta: Share of the past in the running mean, in [0, 1).

    Raises:
        TypeError: If a setting is no number, or the steps are no int.
        ValueError: If a setting is out of its range.

    Examples:
        A student whose difference from the teacher falls; KL(p_t || student) stays.

        >>> from taid_jax.schedule import GapScheduler
        >>> scheduler = GapScheduler(num_train_steps=1000, t_start=0.4)
        >>> state = scheduler.init()
        >>> for step in range(200):
        ...     kl_target = state.t**2 * 0.995**step
        ...     state = scheduler.update(state, kl_target, step)
        >>> print(f"t {state.t:.2f}, KL {state.kl_start:.2f} -> {kl_target:.2f}")
        t 0.62, KL 0.16 -> 0.14
    """

    num_train_steps: int
    t_start: float | int = 0.4
    t_end: float | int = 1.0
    rate: float | int = 0.1
    beta: float | int = 0.9

    watches: ClassVar[str] = "kl_target"
    """The figure of a step that `update` is given."""

    def __post_init__(self) -> None:
        _check(self, "rate")
        if not self.t_start > 0:
            raise ValueError(
                "need t_start > 0, as t grows by factors and at 0 the target is the "
                f"student itself, got t_start = {self.t_start}"
            )
        if not 0 < self.rate <= 1:
            raise ValueError(f"need 0 < rate <= 1, got rate = {self.rate}")

    def init(self) -> GapState:
        """Returns the state before the first step: t is `t_start`, nothing seen."""
        # An array each: a step that donates its state may not have one twice.
        return GapState(*(jnp.asarray(x, jnp.float32) for x in (self.t_start, 0, 0, 0)))

    def update(
        self,
        state: GapState,
        kl_target: Real[ArrayLike, "..."],
        step: Real[ArrayLike, "..."],
    ) -> GapState:
        """Returns the state after an optimizer step; its t is for the next step.

        Args:
            state: The state that the step used.
            kl_target: KL(p_t || student) of that step, TAID's metric of that name (not
                its loss, a cross-entropy), the token-weighted mean over the whole
                global batch, in nats. One that is not finite leaves the state as it is.
            step: Index of that step, from 0. Steps past the end are safe; NaN leaves
                the state as it is.
        """
        square = state.t * state.t
        count = state.num_updates + 1
        new = jnp.asarray(kl_target, jnp.float32) / square
        mean = self.beta * state.mean + (1 - self.beta) * new
        kl = square * mean / (1 - jnp.asarray(self.beta, jnp.float32) ** count)
        # Of a student that has reached its target the logarithm is a number, too.
        kl = jnp.maximum(kl, jnp.finfo(jnp.float32).tiny)
        window = min(round(1 / (1 - self.beta)), max(1, self.num_train_steps // 10))
        start = jnp.where(count <= window, kl, state.kl_start)
        t = state.t * jnp.exp(self.rate / 2 * (jnp.log(start) - jnp.log(kl)))

        left = self.num_train_steps - 1 - jnp.asarray(step, jnp.float32)
        line = state.t + (self.t_end - state.t) / jnp.maximum(left, 1.0)
        # Where the step is NaN, so is the line.
        t = jnp.where(left > self.num_train_steps / 10, t, jnp.maximum(t, line))
        t = jnp.maximum(state.t, jnp.minimum(self.t_end, t))
        return _if_finite(GapState(t, mean, start, count), state)


ScheduleState = TAIDState | GapState


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

    watches: ClassVar[str] = "distil_loss"
    """The figure of a step that `update` is given."""

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
        return TAIDState(
            t=t,
            prev_loss=jnp.asarray(jnp.inf, jnp.float32),
            momentum=jnp.zeros((), jnp.float32),
        )

    def update(
        self,
        state: TAIDState,
        loss: Real[ArrayLike, "..."],
        step: Int[ArrayLike, "..."],
    ) -> TAIDState:
        """Returns the state after an optimizer step; see `TAIDScheduler.update`."""
        loss = jnp.asarray(loss, jnp.float32)
        t = self._at(jnp.asarray(step, jnp.float32) + 1)
        return _if_finite(TAIDState(t, loss, state.momentum), state)

    def _at(self, step: Array) -> Array:
        return jnp.clip(jnp.asarray(self.schedule(step), jnp.float32), 0.0, 1.0)


_State = TypeVar("_State", TAIDState, GapState)


def _if_finite(after: _State, before: _State) -> _State:
    """Returns the state before where the one after, which holds the loss, is not."""
    finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, after))
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)


def _check(scheduler: TAIDScheduler | GapScheduler, speed: str) -> None:
    """Raises unless the settings that both have are numbers and in their range."""
    steps, start, end = scheduler.num_train_steps, scheduler.t_start, scheduler.t_end
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise TypeError(f"need an int for num_train_steps, got {show(steps)}")
    for name in ("t_start", "t_end", speed, "beta"):
        value = getattr(scheduler, name)
        if not isinstance(value, int | float | np.integer | np.floating | Array):
            raise TypeError(f"need a real number for {name}, got {show(value)}")
    if steps < 1:
        raise ValueError(f"need num_train_steps >= 1, got num_train_steps = {steps}")
    if not 0 <= start <= end <= 1:
        raise ValueError(
            f"need 0 <= t_start <= t_end <= 1, got t_start = {start}, t_end = {end}"
        )
    # As the float32 that it becomes.
    if not 0 <= np.float32(scheduler.beta) < 1:
        raise ValueError(f"need 0 <= beta < 1, got beta = {scheduler.beta}")
