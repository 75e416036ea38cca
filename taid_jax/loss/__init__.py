"""Losses of knowledge distillation: pure functions of arrays.

An objective is a pytree that gives the loss of every token; `distillation_loss` is its
mean over counted tokens, `fused_loss` its sum straight from hidden states.
"""

from taid_jax.loss.baselines import CTKD as CTKD
from taid_jax.loss.baselines import DKD as DKD
from taid_jax.loss.baselines import CrossEntropy as CrossEntropy
from taid_jax.loss.baselines import ctkd_strength as ctkd_strength
from taid_jax.loss.divergences import AdaptiveKL as AdaptiveKL
from taid_jax.loss.divergences import ForwardKL as ForwardKL
from taid_jax.loss.divergences import JensenShannon as JensenShannon
from taid_jax.loss.divergences import ReverseKL as ReverseKL
from taid_jax.loss.divergences import SkewForwardKL as SkewForwardKL
from taid_jax.loss.divergences import SkewReverseKL as SkewReverseKL
from taid_jax.loss.divergences import TotalVariation as TotalVariation
from taid_jax.loss.fused import fused_loss as fused_loss
from taid_jax.loss.mix import Mix as Mix
from taid_jax.loss.objective import Objective as Objective
from taid_jax.loss.reduce import distillation_loss as distillation_loss
from taid_jax.loss.reduce import distillation_sums as distillation_sums
from taid_jax.loss.taid import TAID as TAID
from taid_jax.loss.taid import taid_loss as taid_loss
from taid_jax.types import Head as Head
