"""The format of a recorded training run: settings, batches, what came out."""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import numpy as np

from parity.recordings import RecordingError, check_arrays, load_arrays, load_json
from parity.torch_reference import ScheduleSettings
from taid_jax.settings import ObjectiveName

BATCH_KEYS = ("input_ids", "attention_mask", "labels")
STEP_KEYS = ("loss", "lm_loss", "t_used", "t_after", "grad_norm", "lr")
MODELS = ("teacher", "student_init", "student_final")
RECORDED_NAMES: dict[str, ObjectiveName] = {
    "taid": "taid",
    "sft": "sft",
    "fkl": "forward_kl",
    "rkl": "reverse_kl",
    "tvd": "total_variation",
    "js": "jensen_shannon",
    "skew_fkl": "skew_forward_kl",
    "skew_rkl": "skew_reverse_kl",
}
"""What `run.json` may name as its loss, and our name of it. Adaptive KL, DKD and CTKD
are not among them: what the published code computes there is not followed."""


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The optimizer's numbers; every parameter is decayed."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What `run.json` says.

    Attributes:
        loss: A key of `RECORDED_NAMES`.
        t_start: Where TAID's t starts.
        t_end: Where it ends.
        alpha: Step size of its controller.
        beta: Momentum of its controller.
        disable_adaptive: t follows the line alone.
        distil_ratio: Share of the objective; the rest is next-token cross-entropy.
        lr: Learning rate of the first step; a cosine takes it to 0.
        steps: Optimizer steps.
        batch: Sequences of a step.
        length: Tokens of a sequence.
        adamw: The optimizer.
        clip_global_norm: Of the gradient.
    """

    loss: str = "taid"
    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-3
    beta: float = 0.9
    disable_adaptive: bool = False
    distil_ratio: float = 1.0
    lr: float = 5e-3
    steps: int = 60
    batch: int = 4
    length: int = 48
    adamw: AdamW = AdamW()
    clip_global_norm: float = 1.0

    @property
    def objective(self) -> ObjectiveName:
        """Our name of the loss."""
        return RECORDED_NAMES[self.loss]

    def schedule(self) -> ScheduleSettings:
        """Returns the arguments of the schedule, ours and PyTorch's."""
        return {
            "num_train_steps": self.steps,
            "t_start": self.t_start,
            "t_end": self.t_end,
            "alpha": self.alpha,
            "beta": self.beta,
            "disable_adaptive": self.disable_adaptive,
        }


class Run(NamedTuple):
    """A recorded run.

    Attributes:
        folder: With the models in it.
        settings: From `run.json`.
        batches: `input_ids`, `attention_mask`, `labels`, each (steps, batch, length).
        steps: `loss`, `lm_loss`, `t_used`, `t_after`, `grad_norm`, `lr`, each (steps,).
    """

    folder: pathlib.Path
    settings: RunSettings
    batches: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]


def load_run(folder: pathlib.Path) -> Run:
    """Returns a recorded run, of a folder as `golden/README.md` describes it.

    Raises:
        RecordingError: Naming what is missing, misshapen or unknown in it.
    """
    settings = _read_settings(folder / "run.json")
    shape = (settings.steps, settings.batch, settings.length)
    batches = load_arrays(folder / "batches.npz")
    check_arrays(folder / "batches.npz", batches, dict.fromkeys(BATCH_KEYS, shape))
    steps = load_arrays(folder / "run.npz")
    check_arrays(folder / "run.npz", steps, dict.fromkeys(STEP_KEYS, (settings.steps,)))
    missing = [name for name in MODELS if not (folder / name).is_dir()]
    if missing:
        raise RecordingError(f"{folder}: missing model folders: {', '.join(missing)}")
    return Run(folder, settings, batches, steps)


def _read_settings(path: pathlib.Path) -> RunSettings:
    content = load_json(path)
    names = {field.name for field in dataclasses.fields(RunSettings)} - {"adamw"}
    known = {name: content[name] for name in names if name in content}
    adamw = content.get("adamw", {})
    numbers = {field.name for field in dataclasses.fields(AdamW)}
    settings = RunSettings(
        **known, adamw=AdamW(**{name: adamw[name] for name in numbers if name in adamw})
    )
    if settings.loss not in RECORDED_NAMES:
        raise RecordingError(
            f"{path}: need loss to be one of {', '.join(RECORDED_NAMES)}, "
            f"got {settings.loss!r}"
        )
    if content.get("dtype", "float32") != "float32":
        raise RecordingError(f"{path}: need dtype float32, got {content['dtype']!r}")
    return settings


def save_settings(path: pathlib.Path, settings: RunSettings) -> None:
    """Writes `run.json`."""
    content = dataclasses.asdict(settings)
    content |= {"lr_schedule": "cosine to 0, no warm-up", "dtype": "float32"}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
