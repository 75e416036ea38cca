"""What the fused head compiles to: its products, its memory, how often."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss
from taid_jax.types import Head

pytestmark = pytest.mark.optimised

STUDENT, TEACHER = 16, 24
"""As `arrays` makes them."""


def test_fused_loss_products_are_those_that_are_needed(arrays, fused, products):
    a, objective = arrays(tokens=(16,)), loss.TAID(jnp.float32(0.4))

    def value(hidden, kernel):
        return fused(a, objective, hidden, kernel, mask=None, chunk_size=4)[0]

    count = functools.partial(products, tokens=16)
    arguments = a["student"], a["kernel"]
    forward, all_four = STUDENT + TEACHER, 3 * STUDENT + TEACHER
    assert count(value, *arguments) == forward
    assert count(jax.value_and_grad(value, argnums=(0, 1)), *arguments) == all_four
    # A frozen head, and nothing but the head.
    for argnums in (0, 1):
        grad = jax.value_and_grad(value, argnums=argnums)
        assert count(grad, *arguments) == forward + STUDENT

    def cross_entropy(hidden, kernel):
        return fused(a, loss.CrossEntropy(), hidden, kernel, chunk_size=4)[0]

    grad = jax.grad(cross_entropy, argnums=(0, 1))
    assert count(grad, *arguments) == 3 * STUDENT


def test_fused_loss_under_checkpoint_and_vmap_repeats_no_product(
    arrays, fused, products
):
    a, objective = arrays(tokens=(16,)), loss.TAID(jnp.float32(0.4))

    def value(hidden, kernel):
        return fused(a, objective, hidden, kernel, mask=None, chunk_size=4)[0]

    arguments, once = (a["student"], a["kernel"]), 3 * STUDENT + TEACHER
    grad = jax.grad(jax.checkpoint(value), argnums=(0, 1))
    assert products(grad, *arguments, tokens=16) == once
    keep = jax.checkpoint_policies.save_only_these_names("fused_loss")
    kept = jax.checkpoint(value, policy=keep)
    grad = jax.value_and_grad(kept, argnums=(0, 1))
    assert products(grad, *arguments, tokens=16) == once

    def several(hidden, kernel):
        return jnp.sum(jax.vmap(value, in_axes=(0, None))(hidden, kernel))

    grad = jax.value_and_grad(several, argnums=(0, 1))
    arguments = jnp.stack([a["student"]] * 3), a["kernel"]
    # The teacher's hidden states are the same for all three.
    assert products(grad, *arguments, tokens=16) == 9 * STUDENT + TEACHER


def test_fused_loss_with_a_mask_for_every_example_repeats_no_product(
    arrays, fused, small_chunks, products
):
    a, objective = arrays(tokens=(2, 512)), loss.TAID(jnp.float32(0.4))

    def of(hidden, teacher, mask, labels, kernel):
        b = {**a, "teacher": teacher, "labels": labels}
        return fused(b, objective, hidden, kernel, mask=mask)[0]

    names = "student", "teacher", "mask", "labels", "kernel"
    arguments = [a[name] for name in names]
    every = jax.vmap(jax.value_and_grad(of, (0, 4)), in_axes=(0, 0, 0, 0, None))
    assert products(every, *arguments, tokens=1024) == 3 * STUDENT + TEACHER
    values, (in_hidden, in_kernel) = jax.jit(every)(*arguments)
    for i in range(2):
        one = [x[i] for x in arguments[:-1]]
        value, grads = jax.value_and_grad(of, (0, 4))(*one, a["kernel"])
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        for x, y in zip((in_hidden[i], in_kernel[i]), grads, strict=True):
            assert np.linalg.norm(x - y) <= 1e-6 * np.linalg.norm(y)


def test_fused_loss_of_many_chunks_forms_no_product_twice(
    arrays, fused, both, small_chunks, products
):
    a, objective = arrays(tokens=(1024,)), loss.TAID(jnp.float32(0.4))

    def of(mask, a):
        return both(fused, a, objective, mask=mask)

    count = functools.partial(products, tokens=1024)
    assert count(functools.partial(of, None), a) == 3 * STUDENT + TEACHER
    # In a conditional the dearest branch counts: that of a chunk without masked tokens.
    assert count(of, a["mask"], a) == 3 * STUDENT + TEACHER


@pytest.mark.parametrize(
    ("size", "allowed"),
    [((1024, 576, 576, 49152), 252), ((2048, 512, 1024, 32000), 250)],
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


def test_fused_loss_does_not_compile_again(arrays, fused):
    a = arrays()

    @jax.jit
    def of(objective, mask):
        b = {**a, "mask": mask}
        return fused(b, objective, a["student"], a["kernel"])[0]

    for of_number in (loss.TAID, loss.CTKD, loss.ForwardKL):
        before = of._cache_size()
        of(of_number(jnp.float32(0.1)), a["mask"])
        of(of_number(jnp.float32(0.9)), ~a["mask"])
        assert of._cache_size() == before + 1
