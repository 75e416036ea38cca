"""The fused head: any objective straight from hidden states, without the logits.

From the outside in: `loss` checks and differentiates, `shards` places the work on a
mesh (`mesh`), `chunks` is the loop of one device in sizes of `plan`, `products` and
`strips` are those with the logits' gradient, and `rows` is the objective on a few
tokens.
"""

from taid_jax.loss._fused.loss import FUSED_LOSS as FUSED_LOSS
from taid_jax.loss._fused.loss import fused_loss as fused_loss
