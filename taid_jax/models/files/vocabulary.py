"""What the entries of a vocabulary mean: whether two are the same, which are real."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from taid_jax.errors import ModelError, show
from taid_jax.models.config import DecoderConfig
from taid_jax.models.files.tokenizer import (
    PADS_WITH_END,
    Tokenizer,
    added_tokens,
    encoder,
    warn,
)
from taid_jax.probes import EDGES, TEXTS, first_difference, vocabulary_texts

_EXAMPLES = 5
# Keys of generation_config.json that hold ids and do not say so.
_OTHER_IDS = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids"),
    *("forced_decoder_ids", "sequence_bias"),
)


def count_tokens(tokenizer: Tokenizer) -> int:
    """Returns one more than the largest id that a tokenizer gives.

    That is the number of its tokens, unless it leaves some ids out; these then count as
    entries like any other, for both models alike.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def with_tokenizer(config: DecoderConfig, tokenizer: Tokenizer) -> DecoderConfig:
    """Returns the settings with the padding of the vocabulary marked as such.

    Raises:
        ModelError: If the tokenizer has ids that the model has no embedding for.
    """
    count = count_tokens(tokenizer)
    if not 1 <= count <= config.padded_vocab_size:
        raise ModelError(
            f"the model has {config.padded_vocab_size:,} embeddings, and its tokenizer "
            f"ids up to {count - 1:,}: they do not belong together. Give the folder "
            "that has both, or --resize-embeddings, which makes the model's vocabulary "
            "that of the teacher's tokenizer"
        )
    return dataclasses.replace(config, vocab_size=count)


def resize_vocabulary(params: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns parameters with another number of vocabulary entries.

    Entries beyond the size are cut off; new ones are the mean of those there were, in
    the embedding and in the head. The settings that belong to them are
    `dataclasses.replace(config, vocab_size=size, padded_vocab_size=size)`.

    References:
        The published recipe resizes both models to the teacher's tokenizer.
    """
    resized = dict(params)
    embedding = params["embed"]["embedding"]
    resized["embed"] = {"embedding": _resize(embedding, size, axis=0)}
    if "lm_head" in params:
        # A kernel is (d, vocab), a bias (vocab,): the vocabulary is last in both.
        resized["lm_head"] = {
            name: _resize(leaf, size, axis=leaf.ndim - 1)
            for name, leaf in params["lm_head"].items()
        }
    return resized


def _resize(leaf: Array, size: int, *, axis: int) -> Array:
    there = leaf.shape[axis]
    if size <= there:
        return leaf[(slice(None),) * axis + (slice(0, size),)]
    mean = jnp.mean(leaf.astype(jnp.float32), axis=axis, keepdims=True)
    shape = (*leaf.shape[:axis], size - there, *leaf.shape[axis + 1 :])
    new = jnp.broadcast_to(mean.astype(leaf.dtype), shape)
    return jnp.concatenate([leaf, new], axis=axis)


_NEEDED = (
    "Both models need the same tokenizer, since the student learns the teacher's "
    "probability of each id; take a pair of one family, build the student from the "
    "teacher, or give --resize-embeddings, which makes both vocabularies that of "
    "the teacher's tokenizer and exports the student with it"
)


def same_tokenizer(
    teacher: Tokenizer,
    student: Tokenizer,
    *,
    whose: tuple[str, str] = ("teacher", "student"),
    needed: str = _NEEDED,
) -> None:
    """Raises unless both tokenizers give every token and every text the same ids.

    A distribution over the vocabulary means the same for both models only then; equal
    sizes say nothing, and equal vocabularies nothing about how text is cut. That is
    seen on `probes.TEXTS` and on texts of all tokens. If only texts that begin with
    white space, or have added tokens in them, get other ids, that is a warning: files
    of one model in several formats differ there.

    Args:
        teacher: The one.
        student: The other; another teacher's where there are several.
        whose: What messages call the two.
        needed: Why they have to be the same, and the way out.

    Raises:
        ModelError: With how many ids differ and the first of them, or the first text.
    """
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    one_of, other_of = whose
    if ours != theirs:
        by_id, other_by_id = _by_id(ours), _by_id(theirs)
        different = [
            f"{number} is {by_id.get(number)!r} and {other_by_id.get(number)!r}"
            for number in sorted(by_id.keys() | other_by_id.keys())
            if by_id.get(number) != other_by_id.get(number)
        ]
        raise ModelError(
            f"the tokenizers of {one_of} ({len(ours):,} tokens) and {other_of} "
            f"({len(theirs):,} tokens) differ in {len(different):,} ids: "
            f"{'; '.join(different[:_EXAMPLES])}. {needed}"
        )
    backends = [getattr(each, "backend_tokenizer", None) for each in (teacher, student)]
    if len({backend.to_str() if backend else object() for backend in backends}) == 1:
        return
    encoders = encoder(teacher), encoder(student)
    special = sorted(added_tokens(teacher) | added_tokens(student))
    texts = [*TEXTS, *vocabulary_texts(ours, without=special)]
    if (text := first_difference(*encoders, texts)) is not None:
        one, other = (encode([text])[0] for encode in encoders)
        pairs = enumerate(zip(one, other, strict=False))
        same = next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
        parts = (teacher.convert_ids_to_tokens(ids[same:][:3]) for ids in (one, other))
        raise ModelError(
            f"the tokenizers of {one_of} and {other_of} have the same tokens and cut "
            "text in other ways (splitting, merges or normaliser), first "
            f"{show(text)}: after {same} tokens {' and '.join(map(show, parts))}. "
            f"{needed}"
        )
    edges = [*EDGES, *special, *(f"{token} a\n b" for token in special)]
    if (text := first_difference(*encoders, edges)) is not None:
        warn(
            [
                f"the tokenizers of {one_of} and {other_of} differ in how a text "
                f"begins, or in its special tokens, first in {show(text)}"
            ]
        )


def own_tokenizer(student: Tokenizer, teacher: Tokenizer) -> Tokenizer:
    """Returns the student's tokenizer with what it lacks from the teacher's.

    Chat template and special tokens are the student's, so that what it is trained and
    exported with is what it was made for; tokens that the teacher's finds whole in text
    are found so. Where both have a template and they differ,
    or only one begins texts with its start token, that is a warning. The student's is
    changed in place; both have the same ids, see `same_tokenizer`.
    """
    notes = []
    if not student.chat_template:
        student.chat_template = teacher.chat_template
    elif teacher.chat_template and teacher.chat_template != student.chat_template:
        notes.append(
            "teacher and student have different chat templates: conversations are "
            "rendered by the student's, which is exported; --chat-template takes "
            "another"
        )
    there = added_tokens(student)
    for token in teacher.added_tokens_decoder.values():
        if token.content not in there:
            student.add_tokens([token], special_tokens=token.special)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if getattr(student, name) is None and getattr(teacher, name) is not None:
            setattr(student, name, getattr(teacher, name))
    if getattr(student, PADS_WITH_END, False) and teacher.pad_token is not None:
        student.pad_token = teacher.pad_token
    framed = [each([""])["input_ids"][0] for each in (teacher, student)]
    if framed[0] != framed[1]:
        notes.append(
            f"the teacher's tokenizer puts the ids {show(framed[0])} round a text and "
            f"the student's {show(framed[1])}: texts are framed as the student's"
        )
    warn(notes)
    return student


def translate_ids(
    generation: Mapping[str, object], source: Tokenizer | None, target: Tokenizer
) -> dict[str, object]:
    """Returns settings of generation with the ids of another tokenizer's equal tokens.

    What has no equal token is left out, with a warning.

    Args:
        generation: As in generation_config.json.
        source: What its ids mean; nothing is known of them when None.
        target: What they shall mean.
    """
    found: dict[str, object] = {}
    lost: list[str] = []
    vocabulary = target.get_vocab()
    names = _by_id(source.get_vocab()) if source is not None else {}
    for key, value in generation.items():
        if value is None or not ("token_id" in key or key in _OTHER_IDS):
            found[key] = value
            continue
        ids = value if isinstance(value, list) else [value]
        new = [vocabulary.get(names.get(n, "")) for n in ids if isinstance(n, int)]
        kept = [n for n in new if n is not None]
        if len(kept) < len(ids):
            lost.append(key)
        if kept:
            found[key] = kept if isinstance(value, list) else kept[0]
    if lost:
        warn(
            [
                f"generation settings of the student name ids ({', '.join(lost)}) that "
                "the tokenizer it is exported with has no token for; they are left out"
            ]
        )
    return found


def _by_id(vocabulary: Mapping[str, int]) -> dict[int, str]:
    """Returns id to token; where several tokens have one id, all of them."""
    found: dict[int, str] = {}
    for token, number in sorted(vocabulary.items()):
        found[number] = f"{found[number]} {token}" if number in found else token
    return found
