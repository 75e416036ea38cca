"""The train step of a run and the shapes of its arguments, without an array."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params, decoder_functions, param_axes
from taid_jax.settings import Settings
from taid_jax.sharding import (
    TEACHER_RULES,
    batch_sharding,
    replicated,
    tree_shardings,
)
from taid_jax.train.objective import make_objective, make_scheduler
from taid_jax.train.state import (
    DistillState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    state_shardings,
)
from taid_jax.train.step import make_train_step
from taid_jax.types import Params


def abstract_step(
    settings: Settings, teacher: DecoderConfig, student: DecoderConfig, mesh: Mesh
) -> tuple[Any, tuple[DistillState, Params, dict[str, jax.ShapeDtypeStruct]]]:
    """Returns a run's jitted train step and the shapes and places of its arguments.

    Args:
        settings: Of the run.
        teacher: Its architecture; weights in the compute dtype.
        student: Its architecture; float32 weights.
        mesh: Where the arguments would lie.
    """
    opt, dtype = settings.optimizer, jnp.dtype(settings.model.dtype)
    rate = learning_rate_schedule(
        opt.learning_rate, settings.run.steps, opt.warmup_steps
    )
    optimizer = make_optimizer(
        rate,
        b1=opt.b1,
        b2=opt.b2,
        eps=opt.eps,
        weight_decay=opt.weight_decay,
        clip_norm=opt.clip_norm,
    )
    scheduler = make_scheduler(settings.objective, settings.run.steps)
    objective, learned = make_objective(settings.objective)

    def start(params: Params) -> DistillState:
        return init_state(
            params,
            optimizer=optimizer,
            schedule=scheduler.init(),
            learned=learned,
            seed=settings.run.seed,
        )

    student_params = abstract_params(student)
    state = jax.eval_shape(start, student_params)
    where = tree_shardings(param_axes(student), student_params, mesh)
    shardings = state_shardings(state, where, optimizer, replicated(mesh))
    teacher_params = abstract_params(teacher, dtype)
    batch = {
        key: jax.ShapeDtypeStruct(
            (settings.data.batch_size, settings.data.seq_len),
            jnp.int32,
            sharding=batch_sharding(mesh),
        )
        for key in _batch_keys(packed=settings.data.pack)
    }
    step = make_train_step(
        decoder_functions(student, dtype=dtype, remat=settings.model.remat),
        decoder_functions(teacher, dtype=dtype),
        make_objective=objective,
        scheduler=scheduler,
        optimizer=optimizer,
        learning_rate=rate,
        grad_accum=opt.grad_accum,
        chunk_size=settings.run.chunk_size,
        mesh=mesh,
        shardings=shardings,
        fused=settings.run.fused,
    )
    teacher_shardings = tree_shardings(
        param_axes(teacher),
        teacher_params,
        mesh,
        TEACHER_RULES[settings.model.teacher_sharding],
    )
    return step, (
        _placed(state, shardings),
        _placed(teacher_params, teacher_shardings),
        batch,
    )


def _batch_keys(*, packed: bool) -> tuple[str, ...]:
    extra = ("segment_ids", "positions") if packed else ("attention_mask",)
    return ("input_ids", "labels", *extra)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where
        ),
        shapes,
        shardings,
    )
