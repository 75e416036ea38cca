from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import head, hidden_states
from taid_jax.models.generation import generate, prepare
from taid_jax.models.sampling import SamplingParams

TINY = DecoderConfig(
    vocab_size=67,
    d_model=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=40,
    max_position_embeddings=128,
)


def prompts(config, lengths, seed=0):
    """Random prompts, padded on the left."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths))[None] >= max(lengths) - np.array(lengths)[:, None]
    ids = np.where(mask, rng.integers(1, config.vocab_size, size=mask.shape), 0)
    return jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32)


@pytest.fixture(scope="module")
def tiny_params(random_params):
    # Wide weights: answers that wander, instead of one token over and over.
    return jax.tree.map(lambda leaf: 0.5 * leaf, random_params(TINY))


@pytest.fixture(scope="module")
def scanned_params(tiny_params):
    # Less to compile than layers laid out one by one.
    return prepare(tiny_params, TINY, unroll=False)


LENGTHS, NEW = (3, 10, 6), 12
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": 0}
"""One shape, so that one program serves most tests."""
DRAWN: dict[str, Any] = OPTIONS | {
    "eos_token_ids": (5,),
    "sampling": SamplingParams(0.8, 20, 0.9),
}


def greedy(params, ids, mask, ends=()):
    return generate(params, TINY, ids, mask, eos_token_ids=ends, **OPTIONS)


def test_generate_with_a_cache_gives_the_tokens_of_a_whole_pass(
    tiny_params, scanned_params
):
    ids, mask = prompts(TINY, LENGTHS)
    new = greedy(scanned_params, ids, mask).tokens
    # One pass over prompt and answer: every position has to ask for the next token.
    whole = {
        "input_ids": jnp.concatenate([ids, new], axis=1),
        "attention_mask": jnp.concatenate([mask, jnp.ones_like(new)], axis=1),
    }
    hidden = jax.jit(hidden_states, static_argnums=2)(tiny_params, whole, TINY)
    logits = head(tiny_params, TINY).logits(hidden)
    asked = jnp.argmax(logits, axis=-1)[:, ids.shape[1] - 1 : -1]
    np.testing.assert_array_equal(new, asked)
    assert len(np.unique(new)) > 3
    # What stands in the padding does not matter.
    again = greedy(scanned_params, jnp.where(mask == 0, 5, ids), mask).tokens
    np.testing.assert_array_equal(again, new)


def test_generate_counts_the_tokens_of_each_row_and_computes_no_more(scanned_params):
    ids, mask = prompts(TINY, LENGTHS)
    free = greedy(scanned_params, ids, mask)
    np.testing.assert_array_equal(free.lengths, [NEW] * 3)
    assert int(free.steps) == NEW
    # Tokens that first come after 4, 9 and 2 steps or so.
    tokens = np.asarray(free.tokens)
    ends = {int(row[place]) for row, place in zip(tokens, (3, 8, 1), strict=True)}
    found = greedy(scanned_params, ids, mask, sorted(ends))
    expected = [1 + next(i for i, t in enumerate(row) if t in ends) for row in tokens]
    assert max(expected) < NEW
    np.testing.assert_array_equal(found.lengths, expected)
    assert int(found.steps) == max(expected)
    for row, whole, length in zip(found.tokens, tokens, expected, strict=True):
        np.testing.assert_array_equal(row[:length], whole[:length])
        assert (np.asarray(row[length:]) == 0).all()


def test_generate_drawn_depends_on_the_row_alone(scanned_params):
    ids, mask = prompts(TINY, LENGTHS)
    keys = jax.random.split(jax.random.key(1), 3)

    def drawn(ids, mask, key):
        return generate(scanned_params, TINY, ids, mask, key=key, **DRAWN).tokens

    three = drawn(ids, mask, keys)
    assert (three != drawn(ids, mask, jax.random.key(2))).any()
    # In another order; and alone, with more padding.
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(
        drawn(ids[order], mask[order], keys[order]), three[order]
    )
    row, real = (jnp.pad(each[:1], ((0, 0), (5, 0))) for each in (ids, mask))
    np.testing.assert_array_equal(drawn(row, real, keys[:1]), three[:1])


def test_generate_draws_with_the_probabilities_of_the_model(tiny_params):
    rows = 1000
    ids, mask = prompts(TINY, (6,))
    hidden = jax.jit(hidden_states, static_argnums=2)(
        tiny_params, {"input_ids": ids}, TINY
    )
    logits = head(tiny_params, TINY).logits(hidden)[0, -1]
    wanted = rows * np.asarray(jax.nn.softmax(logits / 2), np.float64)
    found = generate(
        prepare(tiny_params, TINY, unroll=False),
        TINY,
        jnp.tile(ids, (rows, 1)),
        jnp.tile(mask, (rows, 1)),
        max_new_tokens=1,
        eos_token_ids=(),
        pad_token_id=0,
        sampling=SamplingParams(2.0),
        key=jax.random.key(0),
    )
    counts = np.bincount(np.asarray(found.tokens)[:, 0], minlength=TINY.vocab_size)
    statistic = ((counts - wanted) ** 2 / wanted).sum()
    # Mean 66, deviation 11.5 for draws by these probabilities; the seed is fixed.
    assert statistic < 66 + 5 * 11.5


def test_generate_computes_in_bfloat16_when_asked(tiny_params):
    ids, mask = prompts(TINY, (3, 7))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_params)
    prepared = prepare(half, TINY)
    # One by one and transposed on a CPU, and no second copy of any of them.
    unrolled, stacked = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (prepared.layers, half["layers"])
    )
    assert unrolled == stacked
    assert prepared.params is half
    options = {"max_new_tokens": 6, "eos_token_ids": (), "pad_token_id": 0}
    new = generate(prepared, TINY, ids, mask, dtype=jnp.bfloat16, **options)
    scanned = prepare(half, TINY, unroll=False)
    other = generate(scanned, TINY, ids, mask, dtype=jnp.bfloat16, **options)
    np.testing.assert_array_equal(new.tokens, other.tokens)


@pytest.mark.parametrize("new_tokens", [0, 120])
def test_generate_refuses_what_cannot_be_done(new_tokens, tiny_params):
    ids, mask = prompts(TINY, (9, 2))
    options = OPTIONS | {"max_new_tokens": new_tokens}
    with pytest.raises(ModelError, match=f"9 tokens and {new_tokens} new.*128"):
        generate(tiny_params, TINY, ids, mask, eos_token_ids=(), **options)
    with pytest.raises(ModelError, match="pad on the left"):
        greedy(tiny_params, ids[:, ::-1], mask[:, ::-1])
    with pytest.raises(ModelError, match="need a random key"):
        generate(tiny_params, TINY, ids, mask, **DRAWN)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("options", [OPTIONS | {"eos_token_ids": ()}, DRAWN])
def test_generate_refuses_logits_that_are_not_finite(tiny_params, value, options):
    # Not token 0, as the place of the greatest of nothing would be. The second prompt
    # alone has the token whose embedding is broken.
    params = dict(tiny_params)
    params["embed"] = {"embedding": params["embed"]["embedding"].at[7].set(value)}
    params = prepare(params, TINY, unroll=False)
    ids, mask = prompts(TINY, LENGTHS)
    ids = jnp.where(ids == 7, 8, ids).at[1, -1].set(7)
    key = jax.random.key(0) if "sampling" in options else None
    with pytest.raises(ModelError, match=r"not finite .* in 1 of 3 completions"):
        generate(params, TINY, ids, mask, key=key, **options)
