"""Checkpoints by Orbax: the student's state, the place in the data, the settings."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from taid_jax.errors import InputError
from taid_jax.settings import Settings, SettingsError, from_dict, to_dict
from taid_jax.train.state import DistillState


class CheckpointError(InputError):
    """There is no checkpoint to go on from, or it is another run's."""


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
        state: The state, each array where the template's was.
        data_state: Where the data iterator stood.
        step: Steps that the state has seen.
    """

    state: DistillState
    data_state: dict[str, Any]
    step: int


def _cost(metrics: Mapping[str, float]) -> float:
    return metrics["cost"]


def _known(cost: float | None) -> bool:
    return cost is not None and math.isfinite(cost)


class Checkpoints:
    """The checkpoints of one output folder: the last few, and the best.

    Saving runs in the background and becomes visible by a rename, so that a killed
    process leaves the last good checkpoint as it was.

    Args:
        folder: Made if it is missing.
        keep: How many of the last are kept, beside the best. What falls behind is
            deleted when the next save is whole, so that one more may lie there, after a
            kill for as long as it takes to the next save.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,
            # Only with this are costs written, so that a resumed run knows the best.
            best_fn=_cost,
            best_mode="min",
            preservation_policy=managers.AnyPreservationPolicy(
                [
                    managers.LatestN(keep),
                    managers.BestN(
                        get_metric_fn=_cost,
                        reverse=True,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "settings": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """Returns the step of the last whole checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps of all whole checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: DistillState,
        data_state: dict[str, Any],
        settings: Settings,
        *,
        cost: float | None = None,
    ) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        Args:
            step: Steps that the state has seen.
            state: What is saved; the teacher is not.
            data_state: Of the data iterator; JSON.
            settings: Of the run.
            cost: Of this state where it was evaluated; the lowest is the best.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                data=ocp.args.JsonSave(data_state),
                settings=ocp.args.JsonSave(to_dict(settings)),
            ),
            # Orbax wants a figure of each.
            metrics={"cost": cost if _known(cost) else math.inf},
            force=True,
        )

    def wait(self) -> None:
        """Blocks until what was started is on disk; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._manager.close()

    def _step(self, step: int | None) -> int:
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(
                f"{self.folder} has no checkpoint to go on from; leave --resume out to "
                "start anew"
            )
        return step

    def settings(self, step: int | None = None) -> Settings:
        """Returns the settings that a checkpoint was made with.

        Raises:
            CheckpointError: If there is none, or it cannot be read.
        """
        step = self._step(step)
        try:
            values = self._manager.restore(
                step, args=ocp.args.Composite(settings=ocp.args.JsonRestore())
            )["settings"]
            return from_dict(values)
        except (OSError, json.JSONDecodeError, SettingsError, KeyError) as error:
            raise CheckpointError(
                f"the settings of checkpoint {step} in {self.folder} cannot be read: "
                f"{error}"
            ) from error

    def _check_shapes(self, template: DistillState, step: int) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(template._asdict())
        wanted = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
            for path, leaf in leaves
        }
        saved = {
            leaf.name: tuple(leaf.shape)
            for leaf in jax.tree.leaves(self._manager.item_metadata(step)["state"])
        }
        differences = [
            f"{name}: saved {saved.get(name, 'not at all')}, "
            f"here {wanted.get(name, 'not at all')}"
            for name in sorted(saved.keys() | wanted.keys())
            if saved.get(name) != wanted.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} does not fit this model and "
                "optimizer:\n  " + "\n  ".join(differences)
            )

    def restore(self, template: DistillState, step: int | None = None) -> Restored:
        """Returns a checkpoint, the last one when `step` is None.

        Args:
            template: A state, or its shapes with shardings: where each array goes.
            step: Which checkpoint.

        Raises:
            CheckpointError: If there is none, or its arrays are not the template's; all
                differences are listed.
        """
        step = self._step(step)
        self._check_shapes(template, step)
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(template._asdict()),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} cannot be read: {error}"
            ) from error
        return Restored(DistillState(**found["state"]), found["data"], step)
