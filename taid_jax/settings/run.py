"""Settings of a run as a whole."""

import dataclasses
import math

from taid_jax.settings.checks import need


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How long, where, and what is kept.

    Attributes:
        output: Folder for checkpoints, metrics, the report and the student.
        steps: Optimizer steps.
        epochs: Passes over the training data; sets `steps` once the data are read.
        evals_per_epoch: Evaluations and checkpoints of every epoch; sets `eval_every`
            and `save_every` once the data are read. Counts only beside `epochs`.
        seed: Of the data order and of random weights.
        resume: Go on from the last sound checkpoint in the output folder, with the
            settings of the run where they are not given again; more steps make it
            longer. Without any checkpoint it starts anew.
        resume_step: Go on from this checkpoint; newer ones are set aside.
        eval_every: Steps between held-out evaluations; 0: only before and after.
        save_every: Steps between checkpoints; 0: only at the end.
        log_every: Steps between lines of metrics.jsonl.
        keep: Checkpoints kept beside the best one.
        max_skipped: Stop after this many non-finite steps in a row.
        mesh: Devices along each axis, such as `data=1,fsdp=-1,tensor=1`; -1 takes
            what is left.
        logits_loss: Build the whole logits instead of the fused head.
        chunk_size: Tokens of one chunk of the fused head; chosen when None.
    """

    output: str = "runs/default"
    steps: int = 60
    epochs: float | None = None
    evals_per_epoch: int | None = None
    seed: int = 0
    resume: bool = False
    resume_step: int | None = None
    eval_every: int = 20
    save_every: int = 20
    log_every: int = 1
    keep: int = 2
    max_skipped: int = 10
    mesh: str = "data=1,fsdp=-1,tensor=1"
    logits_loss: bool = False
    chunk_size: int | None = None

    def __post_init__(self):
        need("output", self.output, bool(self.output), "a folder")
        for name in ("steps", "log_every", "keep", "max_skipped"):
            need(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("seed", "eval_every", "save_every"):
            need(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        step = self.resume_step
        need("resume_step", step, step is None or step >= 0, ">= 0")
        need("resume_step", step, step is None or self.resume, "--resume beside it")
        epochs, evaluations = self.epochs, self.evals_per_epoch
        need(
            "epochs",
            epochs,
            epochs is None or (math.isfinite(epochs) and epochs > 0),
            "> 0",
        )
        need(
            "evals_per_epoch",
            evaluations,
            evaluations is None or evaluations >= 1,
            ">= 1",
        )
        chunk = self.chunk_size
        need("chunk_size", chunk, chunk is None or chunk >= 1, ">= 1")
