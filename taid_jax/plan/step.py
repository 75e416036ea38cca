"""The train step of a run and the shapes of its arguments, without an array."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params, param_axes
from taid_jax.settings import Settings
from taid_jax.sharding import TEACHER_RULES, batch_sharding, tree_shardings
from taid_jax.train.build import build_step, placed
from taid_jax.train.state import DistillState
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
    built = build_step(settings, student, teacher, mesh)
    teacher_params = abstract_params(teacher, jnp.dtype(settings.model.dtype))
    batch = {
        key: jax.ShapeDtypeStruct(
            (settings.data.batch_size, settings.data.seq_len),
            jnp.int32,
            sharding=batch_sharding(mesh),
        )
        for key in _batch_keys(packed=settings.data.pack)
    }
    teacher_shardings = tree_shardings(
        param_axes(teacher),
        teacher_params,
        mesh,
        TEACHER_RULES[settings.model.teacher_sharding],
    )
    teacher_params = placed(teacher_params, teacher_shardings)
    return built.step, (built.state, teacher_params, batch)


def _batch_keys(*, packed: bool) -> tuple[str, ...]:
    extra = ("segment_ids", "positions") if packed else ("attention_mask",)
    return ("input_ids", "labels", *extra)
