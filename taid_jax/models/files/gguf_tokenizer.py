"""The tokenizer that a GGUF file describes, built so that every id is the file's."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from taid_jax.errors import ModelError, parsing, show
from taid_jax.models.files.gguf_splitting import SPLITTINGS, Splitting

_KEYS: Mapping[str, str] = {
    "tokenizer_type": "model",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "precompiled_charsmap": "precompiled_charsmap",
}
"""What `transformers` calls the entries of `tokenizer.ggml` in a GGUF file."""

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def build(
    metadata: Mapping[str, object], origin: str
) -> tuple[PreTrainedTokenizerFast, tuple[str, ...]] | None:
    """Returns the tokenizer that a GGUF file describes, and what should be known of it.

    None if the file has none.

    Byte-level ones are built here, since what `transformers` makes of them has neither
    all rules of cutting nor always the file's ids. Of the others its own classes know
    the rules; they need no PyTorch. Every id is then compared with the file's list.

    Raises:
        ModelError: If it is damaged, of a kind or with a rule of cutting that is not
            known, or its ids would be others than the file's.
    """

    def value(key: str) -> object:
        return metadata.get(f"tokenizer.ggml.{key}")

    entries = {name: found for name, key in _KEYS.items() if (found := value(key))}
    listed = entries.get("tokens")
    if not isinstance(listed, list) or not listed:
        return None
    count = _without_padding(listed, entries.get("token_type"))
    # llama.cpp names empty entries so.
    tokens = [token or f"[EMPTY_{n}]" for n, token in enumerate(listed[:count])]
    entries["tokens"] = tokens
    for name in ("scores", "token_type"):
        if isinstance(found := entries.get(name), list):
            entries[name] = found[:count]
    options: dict[str, Any] = {}
    for name, key in _SPECIAL.items():
        number = value(f"{key}_token_id")
        if number is None:
            options[f"{name}_token"] = None
        elif isinstance(number, int) and 0 <= number < count:
            options[f"{name}_token"] = tokens[number]
        else:
            raise ModelError(
                f"{origin} has the {name} token {show(number)}, outside its vocabulary "
                f"of {count:,} tokens"
            )
    for name in ("add_bos_token", "add_eos_token"):
        if (given := value(name)) is not None:
            options[name] = bool(given)
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        options["chat_template"] = template
    rule, notes = None, ()
    if entries.get("tokenizer_type") == "gpt2":
        rule, notes = _splitting(value("pre"), origin)
    with parsing(f"the tokenizer in {origin} cannot be used", ModelError):
        if rule is not None:
            backend = _byte_level(entries, rule)
            adds_bos = rule.bos
        else:
            architecture = str(metadata.get("general.architecture"))
            backend = _by_transformers(
                architecture, entries, prefix=value("add_space_prefix")
            )
            adds_bos = entries.get("tokenizer_type") == "llama"
        backend = _checked(backend, tokens, origin)
        if adds_bos and options["bos_token"] is not None:
            options.setdefault("add_bos_token", True)  # As llama.cpp does.
        return PreTrainedTokenizerFast(tokenizer_object=backend, **options), notes


def _splitting(name: object, origin: str) -> tuple[Splitting, tuple[str, ...]]:
    """Returns the rule of cutting that a file names, and what is to be said of it."""
    if name in (None, "", "default"):
        said = "does not say" if not name else "says `default` for"
        note = (
            f"{origin} {said} how its tokenizer cuts text (tokenizer.ggml.pre): the "
            "rule of GPT-2 is used, and ids differ from the model's own if it has "
            "another. Make the file anew with a newer llama.cpp, or take the model's "
            "Hugging Face folder"
        )
        return SPLITTINGS["gpt-2"], (note,)
    if not isinstance(name, str) or name not in SPLITTINGS:
        raise ModelError(
            f"{origin}: its tokenizer cuts text by a rule that is not known here "
            f"(tokenizer.ggml.pre is {show(name)}); another rule would give other ids. "
            "Give the model's Hugging Face folder, with its tokenizer.json. Known: "
            f"{', '.join(sorted(SPLITTINGS))}"
        )
    return SPLITTINGS[name], ()


def _byte_level(entries: Mapping[str, Any], rule: Splitting) -> Backend:
    tokens, kinds = entries["tokens"], entries.get("token_type") or ()
    merges = [tuple(merge.split(" ", 1)) for merge in entries.get("merges") or ()]
    backend = Backend(
        token_models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=rule.whole,
        )
    )
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), "isolated") for p in rule.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # llama.cpp finds both whole in any text.
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        found = [
            AddedToken(token, normalized=False, special=special)
            for token, its_kind in zip(tokens, kinds, strict=False)
            if its_kind == kind
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(found)
    return backend


def _by_transformers(
    architecture: str, entries: Mapping[str, Any], *, prefix: object
) -> Backend:
    # Only where it is needed: the module is slow to import.
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        convert_gguf_tokenizer,
    )

    backend, _ = convert_gguf_tokenizer(architecture, dict(entries))
    if prefix is not None and not prefix and entries["tokenizer_type"] == "llama":
        # The converter puts a space before a text whatever the file says.
        rules = json.loads(backend.to_str())
        if (rules["pre_tokenizer"] or {}).get("type") == "Metaspace":
            rules["pre_tokenizer"]["prepend_scheme"] = "never"
        if rules["normalizer"]:
            listed = rules["normalizer"].get("normalizers", [rules["normalizer"]])
            kept = [part for part in listed if part["type"] != "Prepend"]
            rules["normalizer"] = {"type": "Sequence", "normalizers": kept}
        kept = [p for p in rules["decoder"]["decoders"] if p["type"] != "Strip"]
        rules["decoder"]["decoders"] = kept
        backend = Backend.from_str(json.dumps(rules))
    return backend


def _checked(backend: Backend, tokens: Sequence[str], origin: str) -> Backend:
    """Returns the tokenizer with the file's tokens alone, after comparing them all."""
    if backend.get_vocab_size() > len(tokens):
        # Special tokens that a class of transformers has by default.
        rules = json.loads(backend.to_str())
        added = rules["added_tokens"]
        rules["added_tokens"] = [a for a in added if a["id"] < len(tokens)]
        backend = Backend.from_str(json.dumps(rules))
    found = {number: token for token, number in backend.get_vocab().items()}
    for number in range(max(len(tokens), len(found))):
        wanted = tokens[number] if number < len(tokens) else None
        # Gemma's runs of spaces are written as spaces in GGUF.
        same = (wanted, wanted and wanted.replace(" ", "\u2581"))
        if (built := found.get(number)) not in same or built is None:
            raise ModelError(
                f"the tokenizer in {origin} cannot be built as the file lists it: id "
                f"{number} is {show(wanted)} there and would be {show(built)}. Give "
                "the model's Hugging Face folder"
            )
    return backend


def _without_padding(tokens: list, kinds: object) -> int:
    """Returns how many tokens there are without what fills a padded vocabulary.

    llama.cpp names each such entry by its id and marks it as unused.
    """
    count = len(tokens)
    if isinstance(kinds, list) and len(kinds) == count:
        while count > 1 and (
            kinds[count - 1] == TokenType.UNUSED
            and tokens[count - 1] == f"[PAD{count - 1}]"
        ):
            count -= 1
    return count


_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
}
_ENDS = ("eos", "eot", "eom")


def read_generation(metadata: Mapping[str, object]) -> dict[str, object]:
    """Returns what a GGUF file says of generation, under the names of transformers.

    That is what its generation_config.json said: how tokens are drawn, and all tokens
    that end an answer, where these are more than the tokenizer's end token.
    """
    found: dict[str, object] = {
        name: metadata[f"general.sampling.{key}"]
        for name, key in _SAMPLING.items()
        if f"general.sampling.{key}" in metadata
    }
    if found:
        found["do_sample"] = True
    ids = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in _ENDS]
    ends = sorted({number for number in ids if isinstance(number, int)})
    return found | {"eos_token_id": ends} if len(ends) > 1 else found
