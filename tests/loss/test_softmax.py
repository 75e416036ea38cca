"""The parts of softmaxes that objectives share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.loss._softmax import row_max, row_maxes

pytestmark = pytest.mark.optimised


@pytest.fixture
def rows():
    a, b = np.random.default_rng(0).standard_normal((2, 2, 3, 50)).astype(np.float32)
    a[0, 0, 7] = -np.inf
    a[0, 1] = -np.inf
    b[1, 2, 4] = np.nan
    return jnp.asarray(a), jnp.asarray(b)


def test_row_maxes_are_the_two_largest(rows):
    found = jax.jit(row_maxes)(*rows)

    for top, array in zip(found, rows, strict=True):
        np.testing.assert_array_equal(top, np.max(array, axis=-1, keepdims=True))


def test_row_maxes_have_the_derivative_of_the_largest(rows):
    a, b = jnp.nan_to_num(rows[0][0]), rows[1][0]

    found = jax.jit(jax.jacrev(row_maxes, argnums=(0, 1)))(a, b)

    of_row = jax.jit(jax.jacrev(row_max))
    of_a, of_b = of_row(a), of_row(b)
    assert float(jnp.abs(of_b).sum()) > 0
    np.testing.assert_array_equal(found[0][0], of_a)
    np.testing.assert_array_equal(found[1][1], of_b)
    assert not found[0][1].any()
    assert not found[1][0].any()


def test_row_maxes_of_a_spread_vocabulary_reduce_and_do_not_gather(rows):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=auto)
    layout = jax.NamedSharding(mesh, jax.P("data", "tensor"))
    a, b = (jax.device_put(jnp.tile(x[1], (4, 1)), layout) for x in rows)

    with jax.set_mesh(mesh):
        compiled = jax.jit(row_maxes).lower(a, b).compile()

    text = compiled.as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    for top, array in zip(compiled(a, b), (a, b), strict=True):
        np.testing.assert_array_equal(top, np.max(array, axis=-1, keepdims=True))
