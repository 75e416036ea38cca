"""From settings, models and data to a loop and the state that it starts from."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from taid_jax.data import Dataset, train_iterator
from taid_jax.errors import parsing
from taid_jax.models.decoder import decoder_functions
from taid_jax.settings import Settings
from taid_jax.sharding import batch_part, replicated
from taid_jax.train.checkpoint import CheckpointError, Checkpoints
from taid_jax.train.inputs import Pair
from taid_jax.train.judge import Judge
from taid_jax.train.loop import Loop
from taid_jax.train.objective import make_objective, make_scheduler
from taid_jax.train.progress import ConsoleProgress
from taid_jax.train.samplers import Sampler
from taid_jax.train.state import (
    DistillState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    state_shardings,
)
from taid_jax.train.step import make_train_step
from taid_jax.train.utilisation import make_meter
from taid_jax.types import Params


def assemble(
    settings: Settings,
    folder: pathlib.Path,
    pair: Pair,
    dataset: Dataset,
    checkpoints: Checkpoints,
    mesh: Mesh,
    judge: Judge,
    sampler: Sampler | None = None,
    step: int | None = None,
    models: Mapping[str, str] | None = None,
) -> tuple[Loop, DistillState]:
    """Returns the loop and the state that it starts from, new or restored.

    Args:
        settings: Of the run.
        folder: Of the run.
        pair: Teacher and student.
        dataset: The data.
        checkpoints: Of the run.
        mesh: Where arrays lie.
        judge: Evaluates a state.
        sampler: Puts the student's answers in place of batches; None for the data.
        step: The checkpoint to go on from; None for a new run.
        models: From `identify_models`, saved with every checkpoint.

    Raises:
        CheckpointError: If the checkpoint does not fit, or cannot be read.
    """
    data, run, opt = settings.data, settings.run, settings.optimizer
    dtype = jnp.dtype(settings.model.dtype)
    student = decoder_functions(
        pair.student_config, dtype=dtype, remat=settings.model.remat
    )
    teacher = decoder_functions(pair.teacher.config, dtype=dtype)
    rate = learning_rate_schedule(opt.learning_rate, run.steps, opt.warmup_steps)
    optimizer = make_optimizer(
        rate,
        b1=opt.b1,
        b2=opt.b2,
        eps=opt.eps,
        weight_decay=opt.weight_decay,
        clip_norm=opt.clip_norm,
    )
    scheduler = make_scheduler(settings.objective, run.steps)
    objective, learned = make_objective(settings.objective)

    def start(params: Params) -> DistillState:
        return init_state(
            params,
            optimizer=optimizer,
            schedule=scheduler.init(),
            learned=learned,
            seed=run.seed,
        )

    shapes = jax.eval_shape(start, pair.student_params)
    shardings = state_shardings(shapes, pair.shardings, optimizer, replicated(mesh))
    part, parts = batch_part(mesh)
    batches = train_iterator(
        dataset.train,
        data.batch_size,
        seed=run.seed,
        process_index=part,
        process_count=parts,
        with_prompts=sampler is not None,
    )
    evaluations: list[dict[str, Any]] | None = []
    if step is not None:
        template = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=where
            ),
            shapes,
            shardings,
        )
        restored = checkpoints.restore(template, step)
        state, place = restored.state, restored.data_state
        with parsing(f"the place in the data of checkpoint {step}", CheckpointError):
            batches.set_state(place["iterator"])
            if sampler is not None:
                sampler.set_state(place["sampler"])
        evaluations = place.get("evaluations")
    else:
        begin = jax.jit(start, out_shardings=shardings, donate_argnums=0)
        state = begin(pair.student_params)

    train_step = make_train_step(
        student,
        teacher,
        make_objective=objective,
        scheduler=scheduler,
        optimizer=optimizer,
        learning_rate=rate,
        grad_accum=opt.grad_accum,
        shardings=shardings,
        chunk_size=run.chunk_size,
        mesh=mesh,
        fused=run.fused,
    )
    loop = Loop(
        settings=settings,
        folder=folder,
        train_step=train_step,
        teacher_params=pair.teacher.params,
        batches=batches,
        fingerprint=dataset.info.fingerprint,
        evaluate=judge,
        checkpoints=checkpoints,
        mesh=mesh,
        progress=ConsoleProgress(Console(quiet=True), run.steps),
        meter=make_meter(settings, pair.student_config, pair.teacher.config, mesh),
        sampler=sampler,
        models=models or {},
        evaluations=evaluations,
    )
    return loop, state
