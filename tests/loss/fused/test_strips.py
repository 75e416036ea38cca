"""What a CPU forms of a chunk of which only the first rows count."""

import functools

import jax
import numpy as np
import pytest

from taid_jax.loss._fused.plan import Plan
from taid_jax.loss._fused.strips import Products, over_counted

BLOCK, CHUNK = 2, 14


@pytest.mark.parametrize("live", range(CHUNK + 1))
def test_over_counted_forms_the_products_of_whole_blocks(live):
    """Of seven blocks, so that each of three binary digits is met, and all of them."""
    rows = np.random.default_rng(0).standard_normal((CHUNK, 3)).astype(np.float32)
    weights = np.arange(1, CHUNK + 1, dtype=np.float32)

    def of_rows(first, number):
        part = jax.lax.dynamic_slice_in_dim(rows, first, number)
        weight = jax.lax.dynamic_slice_in_dim(weights, first, number)
        return Products(weight @ part, 2 * part)

    plan = Plan(groups=1, rows=1, block=BLOCK, chunk=CHUNK, cpu=True)
    found = jax.jit(functools.partial(over_counted, plan, of_rows=of_rows))(live)

    counted = -(-live // BLOCK) * BLOCK
    expected = 2 * np.where(np.arange(CHUNK)[:, None] < counted, rows, 0)
    np.testing.assert_array_equal(found.hidden, expected)
    # The order of a sum of at most 14 float32 numbers of size 14.
    sums = weights[:counted] @ rows[:counted]
    np.testing.assert_allclose(found.kernel, sums, rtol=1e-5, atol=1e-5)
