"""What is filled in when a run begins: its date, and epochs as steps."""

import dataclasses
import datetime
import math

from taid_jax.settings.tree import Settings


def with_date(settings: Settings, saved: Settings | None = None) -> Settings:
    """Returns the settings with the date that chat templates take for today.

    Args:
        settings: Without `template_date` get that of `saved`, or today's.
        saved: Of the run that is resumed; None for a new one.
    """
    date = settings.data.template_date or (saved and saved.data.template_date)
    date = date or datetime.date.today().isoformat()
    data = dataclasses.replace(settings.data, template_date=date)
    return dataclasses.replace(settings, data=data)


def with_steps(settings: Settings, rows: int) -> Settings:
    """Returns the settings with steps for all that is given in epochs.

    Batches go on from one epoch into the next, so that an epoch need not be a whole
    number of steps; each figure is rounded once, and is at least 1. With buckets an
    epoch ends with its last batch, full or not.

    Args:
        settings: Where given, `epochs` sets `steps`, and with it `evals_per_epoch` sets
            `eval_every` and `save_every`; `ctkd_ramp_epochs` sets `ctkd_ramp_steps`.
        rows: Rows of the training data.

    Raises:
        SettingsError: If the steps contradict another setting, such as `warmup_steps`.
    """
    epoch = rows / settings.data.batch_size
    if settings.data.buckets:
        epoch = math.ceil(epoch)
    run, objective = settings.run, settings.objective
    changes: dict[str, int] = {}
    if run.epochs is not None:
        changes["steps"] = max(1, round(run.epochs * epoch))
        # A run of a few steps is judged every few steps, whatever the method's habit.
        if run.evals_per_epoch is not None:
            every = max(1, round(epoch / run.evals_per_epoch))
            changes |= {"eval_every": every, "save_every": every}
    if objective.ctkd_ramp_epochs is not None:
        ramp = max(1, round(objective.ctkd_ramp_epochs * epoch))
        objective = dataclasses.replace(objective, ctkd_ramp_steps=ramp)
    return dataclasses.replace(
        settings, run=dataclasses.replace(run, **changes), objective=objective
    )
