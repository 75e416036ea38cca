"""How the next token is taken from the logits: the most probable, or a drawn one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int, Key

from taid_jax.errors import ModelError

LEAST_TEMPERATURE = 1e-6
"""Below it logits divided by it would not be numbers any more in float32."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """From which tokens, and how evenly, the next one is drawn.

    Attributes:
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Draw from this many of the most probable tokens; from all when None.
        top_p: Draw from the fewest of the most probable tokens (after `temperature`
            and `top_k`) whose probabilities reach this sum. Alone it sorts the
            whole vocabulary at every token: with `top_k` it is much cheaper.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        """Raises ModelError, which lists every setting that is out of range."""
        wrong = []
        warm = self.temperature
        if not (warm == 0 or (math.isfinite(warm) and warm >= LEAST_TEMPERATURE)):
            wrong.append(f"temperature 0 or >= {LEAST_TEMPERATURE}, got {warm}")
        if self.top_k is not None and self.top_k < 1:
            wrong.append(f"top_k >= 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            wrong.append(f"0 < top_p <= 1, got {self.top_p}")
        if not self.temperature and (self.top_k is not None or self.top_p < 1):
            wrong.append(
                "temperature > 0 for top_k and top_p to mean anything, got 0, which "
                "takes the most probable token"
            )
        if wrong:
            raise ModelError("drawing tokens needs " + "; ".join(wrong))


GREEDY = SamplingParams()
"""The most probable token, always."""


def candidates(
    logits: Float[Array, "batch vocab"], sampling: SamplingParams
) -> tuple[Float32[Array, "batch some"], Int[Array, "batch some"] | None]:
    """Returns the log-weights of the tokens that may be drawn, and which these are.

    Tokens are ranked by their logit, equal ones by their id, the lower first. An entry
    that must not be drawn has the weight -inf. The weights are not normalised; the ids
    are None when entry i is token i. The temperature is above 0.
    """
    logits = logits.astype(jnp.float32)
    # The greatest becomes 0, which no temperature, however small, can overflow.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p >= 1:
        return scaled, None
    vocab = logits.shape[-1]
    scaled, ids = jax.lax.top_k(scaled, min(sampling.top_k or vocab, vocab))
    if sampling.top_p < 1:
        shares = jax.nn.softmax(scaled, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        # The first always stays: nothing comes before it.
        scaled = jnp.where(before < sampling.top_p, scaled, -jnp.inf)
    return scaled, ids


def draw(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    sampling: SamplingParams,
) -> Int[Array, " batch"]:
    """Returns a token for each row, drawn with the row's own key.

    A token with a logit of -inf is never drawn; the temperature is above 0.
    """
    weights, ids = candidates(logits, sampling)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, weights.shape[1:]))(keys)
    # The greatest sum of log-weight and Gumbel noise is a draw by the weights.
    place = first_greatest(weights + noise)
    if ids is None:
        return place
    return jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]


def first_greatest(values: Float[Array, "batch entries"]) -> Int[Array, " batch"]:
    """Returns the first place of the greatest value of each row."""
    # Two plain reductions; argmax's reduction of pairs is much slower on a CPU.
    greatest = values.max(axis=-1, keepdims=True)
    places = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    # Without a greatest value (NaN) the first place, which is a token, not padding.
    found = jnp.where(values == greatest, places, values.shape[-1]).min(axis=-1)
    return jnp.where(found < values.shape[-1], found, 0)


def row_keys(key: Key[Array, "*rows"], batch: int) -> Key[Array, " batch"]:
    """Returns a key for each row: those given, or one made from a single key.

    A row's key depends on its number, not on how many rows there are.

    Raises:
        ModelError: If there are other than one key or `batch` keys.
    """
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ModelError(
            f"generate: need one random key or one for each of the {batch} rows, got "
            f"keys of shape {key.shape}"
        )
    return key
