"""What a tokenizer does, as a few hashes: whether two give the same ids."""

import hashlib
import json
from typing import NamedTuple

from taid_jax.data.encoding import Encoder, Tokenizer
from taid_jax.probes import TEXTS, vocabulary_texts


class TokenizerIdentity(NamedTuple):
    """Equal for two tokenizers that give every conversation the same ids.

    Attributes:
        size: How many tokens it has.
        vocabulary: sha256 of its tokens with their ids.
        rules: sha256 of the ids that it gives `probes.TEXTS` and texts of its tokens:
            how it cuts text, however that is written down.
        special: Ids of the tokens that begin and end a text; None for a start token
            that neither the tokenizer nor the template writes.
        template: sha256 of the chat template, None without one.
    """

    size: int
    vocabulary: str
    rules: str
    special: dict[str, int | None]
    template: str | None


def identify(tokenizer: Tokenizer) -> TokenizerIdentity:
    """Returns the identity of a tokenizer, by content, wherever it lies."""
    vocabulary = dict(getattr(tokenizer, "get_vocab", tokenizer.get_added_vocab)())
    encoder = Encoder(tokenizer)
    texts = vocabulary_texts(vocabulary, without=tokenizer.get_added_vocab())
    template = getattr(tokenizer, "chat_template", None)
    starts = encoder.adds_start or "bos_token" in str(template)
    start = getattr(tokenizer, "bos_token_id", None) if starts else None
    return TokenizerIdentity(
        size=len(vocabulary),
        vocabulary=_digest(sorted(vocabulary.items(), key=lambda item: item[1])),
        rules=_digest(encoder.ids([*TEXTS, *texts])),
        special={
            "bos_token_id": start,
            "eos_token_id": getattr(tokenizer, "eos_token_id", None),
        },
        template=_digest(template) if template else None,
    )


def differences(
    made_by: TokenizerIdentity, given: TokenizerIdentity, *, chats: bool
) -> list[str]:
    """Returns what differs, in words; nothing when both give the same ids.

    Args:
        made_by: Of the tokenizer that the data were made with.
        given: Of the one that they are to be read with.
        chats: Whether chat templates matter.
    """
    found = []
    if made_by.vocabulary != given.vocabulary:
        sizes = f"{made_by.size:,} tokens there, {given.size:,} here"
        found.append(f"the vocabulary ({sizes})")
    elif made_by.rules != given.rules:
        found.append("how text is cut (merges, normalizer or pre-tokenizer)")
    for name, number in made_by.special.items():
        if number != given.special.get(name):
            other = given.special.get(name)
            found.append(f"the {name} ({number} there, {other} here)")
    if chats and made_by.template != given.template:
        if given.template is None:
            found.append("the chat template (none here; give it by --chat-template)")
        elif made_by.template is None:
            found.append("the chat template (none there)")
        else:
            digests = f"{made_by.template[:12]} there, {given.template[:12]} here"
            found.append(f"the chat template (sha256 {digests})")
    return found


def _digest(value: object) -> str:
    """Returns the sha256 of a value of JSON."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
