"""Text and chat to batches of token ids and labels.

`load_dataset` reads, encodes and splits; `train_iterator` and `held_out_batches` give
batches of one shape.
"""

from typing import TYPE_CHECKING

from taid_jax._lazy import lazy

if TYPE_CHECKING:
    from taid_jax.data.batches import ExampleSet as ExampleSet
    from taid_jax.data.batches import NumpyBatch as NumpyBatch
    from taid_jax.data.batches import held_out_batches as held_out_batches
    from taid_jax.data.batches import pad_left as pad_left
    from taid_jax.data.batches import train_iterator as train_iterator
    from taid_jax.data.corpus import PYDOC as PYDOC
    from taid_jax.data.dataset import Dataset as Dataset
    from taid_jax.data.dataset import DatasetInfo as DatasetInfo
    from taid_jax.data.dataset import SideInfo as SideInfo
    from taid_jax.data.dataset import load_dataset as load_dataset
    from taid_jax.data.errors import DataError as DataError
    from taid_jax.data.tokens import Tokenizer as Tokenizer

_BATCHES = (
    "ExampleSet",
    "NumpyBatch",
    "held_out_batches",
    "pad_left",
    "train_iterator",
)
_NAMES = {
    "batches": _BATCHES,
    "corpus": ("PYDOC",),
    "dataset": ("Dataset", "DatasetInfo", "SideInfo", "load_dataset"),
    "errors": ("DataError",),
    "tokens": ("Tokenizer",),
}
__getattr__, __all__ = lazy(
    __name__,
    {name: f"{__name__}.{home}" for home, names in _NAMES.items() for name in names},
)


def __dir__() -> list[str]:
    return __all__
