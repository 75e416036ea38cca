"""Losses of knowledge distillation: pure functions of arrays.

An objective is a pytree that gives the loss of every token; `distillation_loss` is its
mean over counted tokens, `fused_loss` its sum straight from hidden states.
"""

from taid_jax.loss._alpha_beta import AlphaBeta
from taid_jax.loss._alpha_mixture import AlphaMixture
from taid_jax.loss._by_text import ByText
from taid_jax.loss._concrete_score import ConcreteScore
from taid_jax.loss._ctkd import CTKD, ctkd_strength, ctkd_temperature
from taid_jax.loss._divergences import (
    AdaptiveKL,
    ForwardKL,
    ReverseKL,
    TotalVariation,
)
from taid_jax.loss._dkd import DKD
from taid_jax.loss._entropy_gated import EntropyGated
from taid_jax.loss._fused import fused_loss
from taid_jax.loss._mix import CrossEntropy, Mix
from taid_jax.loss._mixtures import JensenShannon, SkewForwardKL, SkewReverseKL
from taid_jax.loss._objective import Objective
from taid_jax.loss._reduce import distillation_loss, distillation_sums
from taid_jax.loss._sequences import SequenceWeighted, distillm2_weight
from taid_jax.loss._taid import TAID, taid_loss
from taid_jax.loss._teachers import Teachers, TeachersHead
from taid_jax.loss._topk import TopK, TopKHead
from taid_jax.types import Head

__all__ = [
    "CTKD",
    "DKD",
    "TAID",
    "AdaptiveKL",
    "AlphaBeta",
    "AlphaMixture",
    "ByText",
    "ConcreteScore",
    "CrossEntropy",
    "EntropyGated",
    "ForwardKL",
    "Head",
    "JensenShannon",
    "Mix",
    "Objective",
    "ReverseKL",
    "SequenceWeighted",
    "SkewForwardKL",
    "SkewReverseKL",
    "Teachers",
    "TeachersHead",
    "TopK",
    "TopKHead",
    "TotalVariation",
    "ctkd_strength",
    "ctkd_temperature",
    "distillation_loss",
    "distillation_sums",
    "distillm2_weight",
    "fused_loss",
    "taid_loss",
]


def __dir__() -> list[str]:
    return __all__
