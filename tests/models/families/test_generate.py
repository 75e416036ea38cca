"""Greedy answers of every family with the cache: the words of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

LENGTHS = (1, 2, 3, 5, 8, 11, 4, 9)


@pytest.fixture(scope="module")
def prompts():
    """Eight prompts of different lengths, padded on the left."""
    longest = max(LENGTHS)
    mask = np.arange(longest)[None] >= longest - np.array(LENGTHS)[:, None]
    drawn = np.random.default_rng(0).integers(3, 67, size=mask.shape)
    return np.where(mask, drawn, 0).astype(np.int32), mask.astype(np.int32)


def check_words(case, prompts, new, unroll=True, with_ends=False):
    from taid_jax.models.generation import generate, prepare

    torch = pytest.importorskip("torch")
    ids, mask = prompts
    params = prepare(case.params, case.config, unroll=unroll)

    def of_transformers(ends):
        found = case.torch_model.generate(
            torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=ends,
        )
        return found[:, ids.shape[1] :].numpy()

    def of_ours(ends):
        return np.asarray(
            generate(
                params,
                case.config,
                jnp.asarray(ids),
                jnp.asarray(mask),
                max_new_tokens=new,
                eos_token_ids=ends,
                pad_token_id=0,
            ).tokens
        )

    expected, got = of_transformers(None), of_ours(())
    np.testing.assert_array_equal(got, expected)
    # Answers that wander, so that a mistake would lead elsewhere.
    assert len(np.unique(got)) > 5
    if with_ends:
        # Of tokens that occur: rows stop at different times.
        ends = [int(expected[0, 12]), int(expected[3, 2])]
        stopped, found = of_transformers(ends), of_ours(ends)
        length = stopped.shape[1]
        np.testing.assert_array_equal(found[:, :length], stopped)
        assert (found[:, length:] == 0).all()


@pytest.mark.parametrize("name", ["gemma2", "phi3"])
def test_generate_gives_the_words_of_transformers(name, make_case, prompts):
    # A window, soft caps; a context that is outgrown on the way.
    check_words(make_case(name), prompts, new=16)


def test_generate_stops_where_transformers_does(make_case, prompts):
    case = make_case("llama")
    check_words(case, prompts, new=16, unroll=False, with_ends=True)


@pytest.mark.slow
def test_generate_gives_64_words_of_transformers(case, prompts):
    # The layers under scan: less to compile; laid out one by one above.
    check_words(case, prompts, new=64, unroll=False)
