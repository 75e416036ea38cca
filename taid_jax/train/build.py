"""From settings and architectures to the train step, its state, and the loop."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taid_jax.data import Dataset, train_iterator
from taid_jax.errors import parsing
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params, decoder_functions, param_axes
from taid_jax.models.files.tokenizer import Tokenizer
from taid_jax.settings import Settings
from taid_jax.sharding import batch_part, replicated, tree_shardings
from taid_jax.train.checkpoint import CheckpointError, Checkpoints, read_run
from taid_jax.train.evaluate import HeldOut
from taid_jax.train.loop import Loop
from taid_jax.train.objective import make_objective, make_scheduler
from taid_jax.train.on_policy.build import make_on_policy
from taid_jax.train.on_policy.figures import with_text_figures
from taid_jax.train.pair import Pair
from taid_jax.train.state import (
    DistillState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    state_shardings,
)
from taid_jax.train.step import TrainStep, make_train_step
from taid_jax.train.throughput import make_throughput
from taid_jax.types import ModelFunctions, Params


class BuiltStep(NamedTuple):
    """The train step of a run, and the state that it takes.

    Attributes:
        step: From `make_train_step`.
        init: The state before the first step, from the student's parameters, which it
            takes over.
        state: Shapes of a state, with shardings.
    """

    step: TrainStep
    init: Callable[[Params], DistillState]
    state: DistillState


def build_step(
    settings: Settings, student: DecoderConfig, teacher: ModelFunctions, mesh: Mesh
) -> BuiltStep:
    """Returns the train step that settings ask for, without making an array."""
    run, opt, dtype = settings.run, settings.optimizer, settings.model.dtype
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
    objective, learned = make_objective(settings.objective, run.steps)
    if settings.on_policy.texts != "data" and settings.objective.objective != "sft":
        objective = with_text_figures(objective)

    def init(params: Params) -> DistillState:
        return init_state(
            params,
            optimizer=optimizer,
            schedule=scheduler.init(),
            learned=learned,
            averaged=settings.model.teacher_ema is not None,
        )

    params = abstract_params(student)
    shapes = jax.eval_shape(init, params)
    shardings = state_shardings(
        shapes,
        tree_shardings(param_axes(student), params, mesh),
        optimizer,
        replicated(mesh),
    )
    step = make_train_step(
        decoder_functions(
            student,
            dtype=jnp.dtype(dtype),
            remat=settings.model.remat,
            unroll=settings.model.layer_unroll,
        ),
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
        teacher_ema=settings.model.teacher_ema,
    )
    return BuiltStep(
        step,
        jax.jit(init, out_shardings=shardings, donate_argnums=0),
        placed(shapes, shardings),
    )


def placed(shapes: Any, shardings: Any) -> Any:
    """Returns shapes of arrays, with the shardings of a tree like theirs."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where
        ),
        shapes,
        shardings,
    )


def build_loop(
    settings: Settings,
    folder: pathlib.Path,
    pair: Pair,
    dataset: Dataset,
    checkpoints: Checkpoints,
    mesh: Mesh,
    evaluate: Callable[[DistillState], HeldOut],
    tokenizer: Tokenizer,
    step: int | None = None,
    models: Mapping[str, str] | None = None,
) -> tuple[Loop, DistillState]:
    """Returns the loop and the state that it starts from, new or restored.

    Raises:
        CheckpointError: If the checkpoint does not fit, or cannot be read.
    """
    built = build_step(settings, pair.student_config, pair.teacher_functions, mesh)
    part, parts = batch_part(mesh)
    if settings.on_policy.texts == "data":
        batches = train_iterator(
            dataset.train,
            settings.data.batch_size,
            seed=settings.run.seed,
            process_index=part,
            process_count=parts,
        )
    else:
        batches = make_on_policy(settings, pair, dataset, tokenizer, mesh)
    evaluations: list[dict[str, Any]] = []
    if step is None:
        state = built.init(pair.student_params)
    else:
        state = checkpoints.restore(built.state, step)
        place = read_run(checkpoints.folder / str(step)).place
        with parsing(f"the place in the data of checkpoint {step}", CheckpointError):
            batches.set_state(place["iterator"])
            evaluations = place["evaluations"]
    loop = Loop(
        settings=settings,
        folder=folder,
        train_step=built.step,
        teacher_params=pair.teacher_params,
        batches=batches,
        fingerprint=dataset.info.fingerprint,
        evaluate=evaluate,
        checkpoints=checkpoints,
        mesh=mesh,
        throughput=make_throughput(
            settings,
            pair.student_config,
            [each.config for each in pair.teachers],
            mesh,
            stored=[store.manifest.kind for store in pair.stores],
        ),
        models=models or {},
        evaluations=evaluations,
    )
    return loop, state
