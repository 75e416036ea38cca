"""What a tokenizer does, as a few hashes: whether two give the same ids."""

import hashlib
import json
from typing import Any, NamedTuple

from taid_jax.data.encoding import Tokenizer

# Set by whoever used the tokenizer last; they do not touch the ids of a text.
_PASSING = ("truncation", "padding")


class TokenizerIdentity(NamedTuple):
    """Equal for two tokenizers that give every conversation the same ids.

    Attributes:
        size: How many tokens it has.
        vocabulary: sha256 of its tokens with their ids.
        rules: sha256 of how it cuts text: merges, normalizer, pre-tokenizer, ...; of
            the name of its class where it does not tell.
        special: Ids of the tokens that begin and end a text.
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
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = type(tokenizer).__name__
    else:
        rules = json.loads(backend.to_str())
        rules = {key: value for key, value in rules.items() if key not in _PASSING}
        # Hashed by itself, so that a difference can be named.
        rules["model"].pop("vocab", None)
    template = getattr(tokenizer, "chat_template", None)
    return TokenizerIdentity(
        size=len(vocabulary),
        vocabulary=_digest(sorted(vocabulary.items(), key=lambda item: item[1])),
        rules=_digest(rules),
        special={
            name: getattr(tokenizer, name, None)
            for name in ("bos_token_id", "eos_token_id")
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
