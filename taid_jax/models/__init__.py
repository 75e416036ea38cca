"""Decoders as plain arrays, from Hugging Face folders and GGUF files and back.

    model = load_model("smollm2-135m-instruct")
    states = hidden_states(model.params, {"input_ids": ids}, model.config)
    logits = head(model.params, model.config).logits(states)

Nothing is imported before it is used.
"""

from typing import TYPE_CHECKING

from taid_jax._lazy import lazy

if TYPE_CHECKING:
    from taid_jax.models.adapters import linen_functions as linen_functions
    from taid_jax.models.adapters import nnx_functions as nnx_functions
    from taid_jax.models.config import DecoderConfig as DecoderConfig
    from taid_jax.models.config import RopeConfig as RopeConfig
    from taid_jax.models.decoder import decoder_functions as decoder_functions
    from taid_jax.models.decoder import head as head
    from taid_jax.models.decoder import hidden_states as hidden_states
    from taid_jax.models.decoder import init_params as init_params
    from taid_jax.models.decoder import select_layers as select_layers
    from taid_jax.models.files.load import LoadedModel as LoadedModel
    from taid_jax.models.files.load import export_model as export_model
    from taid_jax.models.files.load import load_config as load_config
    from taid_jax.models.files.load import load_model as load_model
    from taid_jax.models.files.load import random_init as random_init
    from taid_jax.models.files.tokenizer import load_tokenizer as load_tokenizer
    from taid_jax.models.generation import generate as generate
    from taid_jax.models.sampling import SamplingParams as SamplingParams

_NAMES = {
    "adapters": ("linen_functions", "nnx_functions"),
    "config": ("DecoderConfig", "RopeConfig"),
    "decoder": (
        *("decoder_functions", "head", "hidden_states", "init_params"),
        "select_layers",
    ),
    "files.load": (
        *("LoadedModel", "export_model", "load_config", "load_model", "random_init"),
    ),
    "files.tokenizer": ("load_tokenizer",),
    "generation": ("generate",),
    "sampling": ("SamplingParams",),
}
__getattr__, __all__ = lazy(
    __name__,
    {name: f"{__name__}.{home}" for home, names in _NAMES.items() for name in names},
)


def __dir__() -> list[str]:
    return __all__
