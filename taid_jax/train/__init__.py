"""The train step, for your own two models or ours, and the trainer round it.

    step = make_train_step(student, teacher, make_objective=..., scheduler=..., ...)
    state = init_state(student_params, optimizer=optimizer, schedule=scheduler.init())
    state, metrics = step(state, teacher_params, batch)

A model is a `ModelFunctions`; `linen_functions` and `nnx_functions` make one of a Flax
model. Nothing is imported before it is used.
"""

from typing import TYPE_CHECKING

from taid_jax._lazy import lazy

if TYPE_CHECKING:
    from taid_jax.models.adapters import linen_functions as linen_functions
    from taid_jax.models.adapters import nnx_functions as nnx_functions
    from taid_jax.train.objective import make_objective as make_objective
    from taid_jax.train.state import DistillState as DistillState
    from taid_jax.train.state import init_state as init_state
    from taid_jax.train.state import learning_rate_schedule as learning_rate_schedule
    from taid_jax.train.state import make_optimizer as make_optimizer
    from taid_jax.train.step import batch_loss as batch_loss
    from taid_jax.train.step import make_train_step as make_train_step
    from taid_jax.train.teachers import join_params as join_params
    from taid_jax.train.teachers import mix_teachers as mix_teachers
    from taid_jax.types import ModelFunctions as ModelFunctions

_NAMES = {
    "taid_jax.models.adapters": ("linen_functions", "nnx_functions"),
    "taid_jax.train.objective": ("make_objective",),
    "taid_jax.train.state": (
        *("DistillState", "init_state", "learning_rate_schedule", "make_optimizer"),
    ),
    "taid_jax.train.step": ("batch_loss", "make_train_step"),
    "taid_jax.train.teachers": ("join_params", "mix_teachers"),
    "taid_jax.types": ("ModelFunctions",),
}
__getattr__, __all__ = lazy(
    __name__, {name: home for home, names in _NAMES.items() for name in names}
)


def __dir__() -> list[str]:
    return __all__
