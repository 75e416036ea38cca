"""Knowledge distillation of language models in JAX and Flax, built round TAID.

- `taid_jax.loss` and `taid_jax.schedule`: for your own training loop.
- `taid_jax.models`: Hugging Face and GGUF models as plain arrays, and back.
- `taid_jax.train`: the train step, for your own models or ours.

Nothing is imported before it is used.
"""

from typing import TYPE_CHECKING

from taid_jax._lazy import lazy

if TYPE_CHECKING:
    from taid_jax import data as data
    from taid_jax import loss as loss
    from taid_jax import models as models
    from taid_jax import schedule as schedule
    from taid_jax import settings as settings
    from taid_jax import sharding as sharding
    from taid_jax import train as train
    from taid_jax.loss import Head as Head
    from taid_jax.loss import distillation_loss as distillation_loss
    from taid_jax.loss import fused_loss as fused_loss
    from taid_jax.loss import taid_loss as taid_loss
    from taid_jax.schedule import TAIDScheduler as TAIDScheduler
    from taid_jax.schedule import TAIDState as TAIDState
    from taid_jax.types import ModelFunctions as ModelFunctions

__version__ = "0.1.0"

_MODULES = ("data", "loss", "models", "schedule", "settings", "sharding", "train")
_NAMES = {
    "taid_jax.loss": ("Head", "distillation_loss", "fused_loss", "taid_loss"),
    "taid_jax.schedule": ("TAIDScheduler", "TAIDState"),
    "taid_jax.types": ("ModelFunctions",),
}
__getattr__, __all__ = lazy(
    __name__,
    {name: f"taid_jax.{name}" for name in _MODULES}
    | {name: home for home, names in _NAMES.items() for name in names},
)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
