"""Array aliases, batch keys, mesh axes and the small bundle that stands for a model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

IGNORE_INDEX = -100
"""The label of a token that does not count, as in Hugging Face and PyTorch."""

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
"""Mesh axes: copies of the model, shards of its weights, shards of its layers."""

Params = Mapping[str, Any]
"""A nested mapping with arrays at its leaves."""

Batch = Mapping[str, Array | np.ndarray]
"""`input_ids`, `labels`, and where they are needed `attention_mask`, `segment_ids` and
`positions`: int32 arrays of shape (batch, length). `from_student` is 1 where the
student wrote a token's text, in batches of both models' texts."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """The last linear layer of a language model: hidden states to logits.

    Attributes:
        kernel: `(d_model, vocab)`; `(vocab, d_model)` where `transposed`.
        bias: `(vocab,)` or None.
        softcap: Logits become `softcap * tanh(logits / softcap)` when not None.
        vocab_size: Entries from this index on are padding and take no part; None when
            every entry is real.
        transposed: Whether the kernel is a table of rows, such as a tied embedding.
            No transposed copy of it is made.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import Head
        >>> Head(jnp.ones((2, 5))).logits(jnp.ones((3, 2))).shape
        (3, 5)
    """

    # Any: as a tree of layouts or of gradients it has other leaves.
    kernel: Float[Array, "..."] | Any
    bias: Float[Array, " vocab"] | Any | None = None
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    vocab_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def axes(self) -> tuple[int, int]:
        """The kernel's axes (d_model, vocab)."""
        return (1, 0) if self.transposed else (0, 1)

    def logits(
        self, hidden: Float[Array, "*tokens d_model"]
    ) -> Float[Array, "*tokens vocab"]:
        """Returns float32 logits, never rounded; `-inf` at padded entries."""
        return self.finish(
            jax.lax.dot_general(
                hidden,
                self.kernel.astype(hidden.dtype),
                (((hidden.ndim - 1,), (self.axes[0],)), ((), ())),
                preferred_element_type=jnp.float32,
            )
        )

    def finish(
        self, product: Float[Array, "*tokens vocab"]
    ) -> Float[Array, "*tokens vocab"]:
        """Returns the logits made of hidden states times the kernel, float32."""
        logits = product
        if self.bias is not None:
            bias = self.bias.astype(jnp.float32)
            logits += bias.reshape((1,) * (logits.ndim - 1) + (-1,))
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if self.vocab_size is not None and self.vocab_size < logits.shape[-1]:
            entry = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
            logits = jnp.where(entry < self.vocab_size, logits, -jnp.inf)
        return logits


class ModelFunctions(NamedTuple):
    """What the train step needs of a model, whatever it was written with.

    Give `hidden` and `head`, so that the loss runs without building the logits, or
    `logits` alone for a model that offers nothing else.

    Attributes:
        hidden: `(params, batch) -> (batch, length, d_model)`, the last hidden states;
            of a teacher also `loss.TopK`.
        head: `params -> Head`; beside `TopK` a `loss.TopKHead`.
        logits: `(params, batch) -> (batch, length, vocab)`.
    """

    hidden: Callable[[Params, Batch], Any] | None = None
    head: Callable[[Params], Any] | None = None
    logits: Callable[[Params, Batch], Float[Array, "batch length vocab"]] | None = None
