"""Rows of DistiLLM-2: the teacher's and the student's text of each prompt."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.losses import GRADIENTS, VALUE, VALUE_FLOOR
from parity.outcomes import Outcome, gradient_error, value_error
from parity.rows import Row, Tallies, triple
from parity.torch_exact import exact_losses
from parity.torch_reference import Settings
from taid_jax import loss
from taid_jax.types import Head

PLAIN, FUSED = "DistiLLM-2", "DistiLLM-2, fused"
FITTED = "DistiLLM-2, a skew for each text"
WEIGHT, SKEW = 1.25, 0.1
_SHAPE = (4, 6, 97)
_OWN = np.array([False, True, False, True])
_MARGINS = (0.02, 0.01)


class Texts(NamedTuple):
    """Logits of four texts, and labels, -100 where a token does not count."""

    student: np.ndarray
    teacher: np.ndarray
    labels: np.ndarray


def random_texts(seed: int, scale: float) -> Texts:
    """Returns logits with a standard deviation of `scale`, texts of unequal length."""
    rng = np.random.default_rng(seed)
    student, teacher = (scale * rng.standard_normal((2, *_SHAPE))).astype(np.float32)
    lengths = rng.integers(1, _SHAPE[1] + 1, (_SHAPE[0], 1))
    labels = rng.integers(0, _SHAPE[2], _SHAPE[:2], np.int32)
    counted = np.arange(_SHAPE[1]) < lengths
    return Texts(student, teacher, np.where(counted, labels, -100).astype(np.int32))


@functools.partial(jax.jit, static_argnames="name")
def _ours(name: str, student: jax.Array, teacher: jax.Array, labels: jax.Array):
    counted, own = labels != -100, jnp.asarray(_OWN)

    def total(student: jax.Array) -> jax.Array:
        if name == FITTED:
            each = loss.SequenceWeighted(WEIGHT, SKEW, *_MARGINS)
            return jnp.sum(each(student, teacher, labels, own))

        def over(objective: loss.Objective, mask: jax.Array):
            if name == PLAIN:
                return loss.distillation_sums(objective, student, teacher, mask, labels)
            head = Head(jnp.eye(_SHAPE[2]))
            return loss.fused_loss(
                objective, student, head, teacher, head, mask, labels, chunk_size=5
            )

        parts = loss.SkewForwardKL(SKEW), loss.SkewReverseKL(SKEW)
        rows = jnp.broadcast_to(jnp.expand_dims(own, 1), labels.shape)
        return loss.ByText(*parts, WEIGHT).sums(over, counted, rows)[0]

    return jax.value_and_grad(total)(student)


def our_pairs(name: str, texts: Texts) -> Outcome:
    """Returns the loss summed over texts and its gradient, as we compute them."""
    value, gradient = _ours(name, *map(jnp.asarray, texts))
    return Outcome(float(value), np.asarray(gradient, np.float64))


def torch_pairs(name: str, texts: Texts, dtype: torch.dtype) -> Outcome:
    """Returns the same from the definition, text by text, in PyTorch."""
    student = torch.tensor(texts.student).to(dtype).requires_grad_()
    teacher = torch.tensor(texts.teacher).to(dtype)
    labels = torch.tensor(texts.labels).long()
    total = torch.zeros((), dtype=dtype)
    for text, own in enumerate(_OWN):
        counted = labels[text] != -100
        sides = student[text][counted], teacher[text][counted]
        at = labels[text][counted]
        skew = SKEW
        if name == FITTED:
            q, p = (
                side.detach().log_softmax(-1).gather(-1, at[:, None]).mean().exp()
                for side in sides
            )
            found = float(q - p if own else p - q) + 1e-5
            skew = min(max(1 - (1 - SKEW) * _MARGINS[int(own)] / found, 0.01), SKEW)
        kind = "skew_reverse_kl" if own else "skew_forward_kl"
        losses = exact_losses(kind, *sides, at, Settings(teacher_weight=skew))
        total = total + (WEIGHT if own else 2 - WEIGHT) * losses.mean()
    (gradient,) = torch.autograd.grad(total, student)
    return Outcome(float(total.detach()), gradient.double().numpy())


def random_rows(seeds: Iterable[int]) -> list[Row]:
    """Returns the rows of values and gradients of both forms, of random logits."""
    tallies = Tallies("losses")
    for seed in seeds:
        for scale in (0.1, 1.0, 3.0, 10.0):
            texts, case = random_texts(seed, scale), f"seed {seed}, scale {scale:g}"
            for name in (PLAIN, FUSED, FITTED):
                ours = our_pairs(name, texts)
                theirs = torch_pairs(name, texts, torch.float32)
                exact = torch_pairs(name, texts, torch.float64)
                # The skew reverse KL's gradient vanishes where both sides are peaked.
                for quantity, tolerance, error, floor in (
                    ("value", VALUE, value_error, VALUE_FLOOR),
                    ("gradient", GRADIENTS["float32"], gradient_error, 0.1),
                ):
                    far = functools.partial(error, exact=exact, floor=floor)
                    key = (name, f"float32 {quantity}", "PyTorch")
                    errors = triple(far, ours, theirs, exact)
                    tallies.add(key, tolerance, case, *errors)
    return tallies.rows()
