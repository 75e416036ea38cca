import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from taid_jax.sharding import make_mesh, place_batch
from taid_jax.train import token_kl
from taid_jax.train.token_kl import TokenKL, make_token_kl, tokens_of_rows

VOCAB = 23


def _logprobs(functions, params, batch):
    hidden = np.asarray(functions.hidden(params, batch), np.float64)
    logits = hidden @ np.asarray(params["lm_head"]["kernel"], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.multidevice
def test_token_kl_is_that_of_whole_rows(
    functions, make_params, make_batch, monkeypatch
):
    # Four positions at a time, which do not divide the six.
    monkeypatch.setattr(token_kl, "_ENTRIES", 4 * 8 * VOCAB)
    mesh = make_mesh("data=8,fsdp=1,tensor=1")
    student, teacher, batch = make_params(1), make_params(2), make_batch(0)
    compare = make_token_kl(functions, functions, VOCAB, mesh)
    found = compare(student, teacher, place_batch(batch, mesh))

    q, p = (_logprobs(functions, params, batch) for params in (student, teacher))
    # The computation is in float32, of logits up to about 50.
    close = {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(-1), **close)
    labels = np.pad(batch["labels"][:, 1:], [(0, 0), (0, 1)], constant_values=-100)
    np.testing.assert_array_equal(found.labels, labels)
    row, at = np.nonzero(labels >= 0)
    for name, logprobs in (("teacher", p), ("student", q)):
        said = np.exp(logprobs[row, at, labels[row, at]])
        np.testing.assert_allclose(getattr(found, name)[row, at], said, **close)
        order = np.argsort(-logprobs, axis=-1)[..., :5]
        np.testing.assert_array_equal(getattr(found, f"{name}_ids"), order)
        top = np.exp(np.take_along_axis(logprobs, order, -1))
        np.testing.assert_allclose(getattr(found, f"{name}_probs"), top, **close)


def _tokenizer(words, decoder):
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, words[0]))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _found(ids, labels):
    """Figures that say their place: position 2 has KL 2, and so on."""
    ids = np.array([ids], np.int32)
    place = np.broadcast_to(np.arange(ids.shape[1], dtype=np.float32), ids.shape)
    tops = np.zeros((*ids.shape, 1), np.int32), np.full((*ids.shape, 1), 0.5, "float32")
    labels = np.array([labels], np.int32)
    return TokenKL(ids, labels, place, place / 8, place / 16, *tops, *tops)


def test_tokens_of_rows_keeps_spaces_and_puts_figures_at_the_predicted_token():
    # Alone "▁cat" is decoded without its space.
    tokenizer = _tokenizer(["<s>", "▁The", "▁cat", "s"], decoders.Metaspace())
    found = _found([1, 2, 3, 0, 0], [2, 3, -100, -100, -100])
    ((first, second, third),) = tokens_of_rows([found], tokenizer)
    assert first == ["The"]
    assert second == [" cat", 0.0, 0.0, 0.0, [["<s>", 0.5]], [["<s>", 0.5]]]
    assert third[:4] == ["s", 1.0, 0.125, 0.0625]


def test_tokens_of_rows_names_what_is_no_whole_character_or_no_token():
    tokenizer = _tokenizer(["Ã", "©", "Ġa"], decoders.ByteLevel())
    found = _found([2, 0, 1, 9], [0, 1, 9, -100])
    (row,) = tokens_of_rows([found], tokenizer)
    assert [token[0] for token in row] == [" a", "Ã", "©", "<9>"]


def test_tokens_of_rows_without_a_counted_token_are_left_out():
    tokenizer = _tokenizer(["a", "b"], None)
    assert tokens_of_rows([_found([0, 1], [-100, -100])], tokenizer) == []
