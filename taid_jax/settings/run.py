"""Settings of a run as a whole."""

import dataclasses

from taid_jax.settings.checks import Checked, bounded, need


@dataclasses.dataclass(frozen=True)
class RunSettings(Checked):
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
    steps: int = bounded(60, ge=1)
    epochs: float | None = bounded(None, gt=0)
    evals_per_epoch: int | None = bounded(None, ge=1)
    seed: int = bounded(0, ge=0, lt=2**32)
    resume: bool = False
    resume_step: int | None = bounded(None, ge=0)
    eval_every: int = bounded(20, ge=0)
    save_every: int = bounded(20, ge=0)
    log_every: int = bounded(1, ge=1)
    keep: int = bounded(2, ge=1)
    max_skipped: int = bounded(10, ge=1)
    mesh: str = "data=1,fsdp=-1,tensor=1"
    logits_loss: bool = False
    chunk_size: int | None = bounded(None, ge=1)

    def __post_init__(self):
        super().__post_init__()
        step = self.resume_step
        need("resume_step", step, step is None or self.resume, "--resume beside it")
