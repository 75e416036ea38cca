import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.errors import ModelError
from taid_jax.models.sampling import (
    SamplingParams,
    candidates,
    draw,
    first_greatest,
    row_keys,
)


def written_out(logits, temperature, top_k, top_p):
    """Probabilities by token, in float64, straight from the definition."""
    weights = np.exp((logits - logits.max()) / temperature)
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    ranked = [token for token in ranked if weights[token] > 0]
    if top_k is not None:
        ranked = ranked[:top_k]
    total = sum(weights[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if top_p < 1 and mass >= top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


def probabilities_of(logits, sampling):
    weights, ids = candidates(jnp.asarray(logits, jnp.float32), sampling)
    shares = np.asarray(jax.nn.softmax(weights, axis=-1))
    if ids is None:
        return shares
    probabilities = np.zeros(logits.shape)
    np.put_along_axis(probabilities, np.asarray(ids), shares, axis=1)
    return probabilities


SETTINGS = [
    (1.0, None, 1.0),
    (0.3, None, 1.0),
    (2.5, 5, 1.0),
    (1.0, 1, 1.0),
    (1.0, 500, 1.0),
    (1.0, None, 0.9),
    (0.7, None, 0.25),
    (0.7, 7, 0.6),
    (1.3, 20, 0.999),
    (1.0, None, 1e-6),
    (1e-6, None, 1.0),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
@pytest.mark.parametrize("kind", ["random", "ties", "padded"])
def test_candidates_are_those_of_the_definition(kind, temperature, top_k, top_p):
    rng = np.random.default_rng(0)
    sampling = SamplingParams(temperature, top_k, top_p)
    # float32, as the definition has to see the very numbers.
    logits = rng.normal(scale=3, size=(20, 37)).astype(np.float32).astype(np.float64)
    if kind == "ties":
        logits = np.round(logits / 3)
    if kind == "padded":
        logits[:, 30:] = -np.inf
    expected = np.stack([written_out(row, temperature, top_k, top_p) for row in logits])
    found = probabilities_of(logits, sampling)
    np.testing.assert_array_equal(found > 0, expected > 0)
    # Softmax in float32 against float64.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "settings", [(1.0, None, 1.0), (0.5, None, 1.0), (1.4, 6, 1.0), (1.0, None, 0.8)]
)
def test_draw_has_the_probabilities_of_the_definition(settings):
    draws = 20_000
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=1.5, size=12).astype(np.float32)
    logits[10:] = -np.inf
    expected = written_out(logits.astype(np.float64), *settings)
    keys = row_keys(jax.random.key(3), draws)
    rows = jnp.broadcast_to(jnp.asarray(logits)[None], (draws, len(logits)))
    found = np.bincount(
        draw(rows, keys, SamplingParams(*settings)), minlength=len(logits)
    )
    possible = expected > 0
    assert found[~possible].sum() == 0
    wanted = draws * expected[possible]
    statistic = ((found[possible] - wanted) ** 2 / wanted).sum()
    freedom = possible.sum() - 1
    # The seed is fixed. A chi-square of n degrees of freedom has mean n and variance
    # 2 n; five deviations more do not come by chance.
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)
    # And the test can tell: the same draws do not fit another temperature.
    other = draws * written_out(logits.astype(np.float64), 0.9 * settings[0], None, 1.0)
    other = other[possible]
    assert ((found[possible] - other) ** 2 / other).sum() > freedom + 50


def test_first_greatest_is_the_first_of_equals_and_a_token_even_without_numbers():
    values = jnp.array([[1.0, 4, 4, 0], [-jnp.inf, -jnp.inf, -1, -jnp.inf]])
    np.testing.assert_array_equal(first_greatest(values), [1, 2])
    np.testing.assert_array_equal(first_greatest(jnp.full((1, 3), jnp.nan)), [0])


def test_row_keys_do_not_depend_on_the_number_of_rows():
    key = jax.random.key(7)
    few, many = row_keys(key, 2), row_keys(key, 5)
    np.testing.assert_array_equal(
        jax.random.key_data(few), jax.random.key_data(many[:2])
    )
    np.testing.assert_array_equal(
        jax.random.key_data(row_keys(many, 5)), jax.random.key_data(many)
    )
    with pytest.raises(ModelError, match=r"each of the 4 rows.*\(5,\)"):
        row_keys(many, 4)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"temperature": -1.0}, "temperature 0 or >= 1e-06, got -1.0"),
        ({"temperature": float("nan")}, "temperature 0 or >="),
        ({"temperature": 1.0, "top_k": 0}, "top_k >= 1, got 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "0 < top_p <= 1, got 0.0"),
        ({"top_k": 5}, "temperature > 0"),
    ],
)
def test_sampling_refuses_what_cannot_be(values, text):
    with pytest.raises(ModelError, match=text):
        SamplingParams(**values)
