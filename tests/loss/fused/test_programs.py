"""What the fused head compiles to: its products, its memory, how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss
from taid_jax.plan import count_flops
from taid_jax.types import Head

pytestmark = pytest.mark.optimised

STUDENT, TEACHER, VOCAB = 16, 24, 37
"""As `arrays` makes them."""


def _traced(function, *arguments, tokens=16):
    """Operations of its products for every token and entry, as it is traced."""
    flops = count_flops(jax.make_jaxpr(function)(*arguments))
    return flops / (2 * tokens * VOCAB)


def test_fused_loss_products_are_those_that_are_needed(arrays, fused):
    a, objective = arrays(tokens=(16,)), loss.TAID(jnp.float32(0.4))

    def value(hidden, kernel):
        return fused(a, objective, hidden, kernel, mask=None, chunk_size=4)[0]

    arguments = a["student"], a["kernel"]
    forward, all_four = STUDENT + TEACHER, 3 * STUDENT + TEACHER
    assert _traced(value, *arguments) == forward
    assert _traced(jax.value_and_grad(value, argnums=(0, 1)), *arguments) == all_four
    # A frozen head, and nothing but the head.
    for argnums in (0, 1):
        grad = jax.value_and_grad(value, argnums=argnums)
        assert _traced(grad, *arguments) == forward + STUDENT

    def cross_entropy(hidden, kernel):
        return fused(a, loss.CrossEntropy(), hidden, kernel, chunk_size=4)[0]

    grad = jax.grad(cross_entropy, argnums=(0, 1))
    assert _traced(grad, *arguments) == 3 * STUDENT


def _compiled_flops(function, *arguments):
    """As XLA counts them, a loop's body once: what nobody reads is gone."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_fused_loss_under_checkpoint_and_vmap_repeats_no_product(arrays, fused):
    a, objective = arrays(tokens=(16,)), loss.TAID(jnp.float32(0.4))

    def value(hidden, kernel):
        return fused(a, objective, hidden, kernel, mask=None, chunk_size=4)[0]

    arguments = a["student"], a["kernel"]
    once = _compiled_flops(jax.value_and_grad(value, argnums=(0, 1)), *arguments)
    grad = jax.grad(jax.checkpoint(value), argnums=(0, 1))
    keep = jax.checkpoint_policies.save_only_these_names("fused_loss")
    kept = jax.value_and_grad(jax.checkpoint(value, policy=keep), argnums=(0, 1))
    for function in (grad, kept):
        # The value alone is 40 of 72 parts.
        assert _compiled_flops(function, *arguments) < 1.1 * once

    def several(hidden, kernel):
        return jnp.sum(jax.vmap(value, in_axes=(0, None))(hidden, kernel))

    grad = jax.value_and_grad(several, argnums=(0, 1))
    arguments = jnp.stack([a["student"]] * 3), a["kernel"]
    # The teacher's hidden states are the same for all three.
    assert _traced(grad, *arguments) == 9 * STUDENT + TEACHER


def test_fused_loss_with_a_mask_for_every_example_repeats_no_product(
    arrays, fused, small_chunks
):
    a, objective = arrays(tokens=(2, 256)), loss.TAID(jnp.float32(0.4))

    def of(hidden, teacher, mask, labels, kernel):
        b = {**a, "teacher": teacher, "labels": labels}
        return fused(b, objective, hidden, kernel, mask=mask)[0]

    names = "student", "teacher", "mask", "labels", "kernel"
    arguments = [a[name] for name in names]
    one = jax.value_and_grad(of, (0, 4))
    every = jax.vmap(one, in_axes=(0, 0, 0, 0, None))
    # In a conditional the dearest branch counts: that of a chunk without masked tokens.
    assert _traced(every, *arguments, tokens=512) == 3 * STUDENT + TEACHER
    values, (in_hidden, in_kernel) = jax.jit(every)(*arguments)
    one = jax.jit(one)
    for i in range(2):
        value, grads = one(*(x[i] for x in arguments[:-1]), a["kernel"])
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        for x, y in zip((in_hidden[i], in_kernel[i]), grads, strict=True):
            assert np.linalg.norm(x - y) <= 1e-6 * np.linalg.norm(y)


@pytest.mark.parametrize(
    ("size", "allowed"),
    [
        ((1024, 576, 576, 49152), 252),
        pytest.param((2048, 512, 1024, 32000), 250, marks=pytest.mark.slow),
    ],
)
def test_fused_loss_memory(size, allowed):
    """By XLA's own analysis; a mebibyte of it for indices and sums."""
    tokens, student, teacher, vocab = size

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    def mean(hidden, kernel, teacher_hidden, teacher_kernel, mask):
        heads = Head(kernel), Head(teacher_kernel)
        total, sums = loss.fused_loss(
            loss.TAID(jnp.float32(0.4)),
            hidden, heads[0], teacher_hidden, heads[1], mask,
        )  # fmt: skip
        return total / sums["num_tokens"]

    compiled = (
        jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
        .lower(
            shape(tokens, student),
            shape(student, vocab),
            shape(tokens, teacher),
            shape(teacher, vocab),
            shape(tokens),
        )
        .compile()
    )
    # An eighth of the plain form's, 1152 and 1500 MiB, and one gradient of the head.
    assert compiled.memory_analysis().temp_size_in_bytes < allowed * 2**20
