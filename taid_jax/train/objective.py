"""From settings to the objective and the schedule of a run."""

from taid_jax.schedule import TAIDScheduler
from taid_jax.settings import ObjectiveSettings


def make_scheduler(settings: ObjectiveSettings, steps: int) -> TAIDScheduler:
    """Returns TAID's schedule over `steps` optimizer steps."""
    return TAIDScheduler(
        steps,
        t_start=settings.t_start,
        t_end=settings.t_end,
        alpha=settings.alpha,
        beta=settings.beta,
        disable_adaptive=settings.disable_adaptive,
    )
