"""The tokenizer that a GGUF file describes, built so that every id is the file's."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from taid_jax.errors import ModelError, parsing, show


class Splitting(NamedTuple):
    """How text is cut before bytes are merged.

    Attributes:
        patterns: Regular expressions; each cuts its matches out of what is left.
        nfc: Whether text is composed (NFC) first, as the model's tokenizer.json does.
        whole: A piece that is a token is taken as it is, whatever the merges make of
            it.
        bos: The start token is added where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole: bool = False
    bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str, letters: str = r"\p{L}", signs: str = r"\p{L}\p{N}") -> str:
    """The rule of OpenAI's cl100k, which most newer ones vary."""
    return (
        rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
        rf"| ?[^\s{signs}]+[\r\n]*{_SPACES}"
    )


def _cased(digits: str, suffix: str = "") -> str:
    """The rule of OpenAI's o200k: capitals begin a word."""
    lead, upper, lower = (
        r"[^\r\n\p{L}\p{N}]?",
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    )
    return (
        rf"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"
    )


_DIGIT, _THREE = r"\p{N}", r"\p{N}{1,3}"
_POINTS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = (
    rf"{_ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{_SPACES}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = (
    rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+"
    rf"{_SPACES}"
)

_NAMES: Mapping[str, Splitting] = {
    "gpt-2 phi-2 jais trillion granite-docling gigachat a.x-4.0 mellum exaone4 "
    "jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe "
    "modern-bert": Splitting((_GPT2,)),
    "mpt olmo": Splitting((_GPT2,), nfc=True),
    "smollm starcoder refact codeshell exaone minerva-7b mellum2": Splitting(
        (_DIGIT, _GPT2)
    ),
    "command-r": Splitting((_DIGIT, _GPT2), nfc=True),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": (
        Splitting((_words(_THREE),), whole=True, bos=True)
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": Splitting((_words(_THREE),)),
    "minicpm5": Splitting((_THREE, _words(r"\p{N}+")), whole=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez": Splitting(
        (_words(_DIGIT),), nfc=True
    ),
    "stablelm2 hunyuan solar-open grok-2": Splitting((_words(_DIGIT),)),
    "qwen35": Splitting(
        (_words(_DIGIT, r"[\p{L}\p{M}]", r"\p{L}\p{M}\p{N}"),), nfc=True
    ),
    "tekken": Splitting((_cased(_DIGIT),), whole=True, bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Splitting(
        (_cased(_THREE, _SUFFIX + "?"),)
    ),
    "tiny_aya cohere2moe": Splitting(
        (r"\d{1,3}(?=(?:\d{3})*\b)", _cased(_THREE, _SUFFIX + "?"))
    ),
    # Cased letters, spelled out in the model's own file.
    "deepseek-llm": Splitting(
        (
            r"[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN,
            _DIGIT,
        )
    ),
    "deepseek-coder": Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, _DIGIT)),
    "deepseek-v3 hunyuan-dense joyai-llm": Splitting((_THREE, _HAN_KANA, _DEEPSEEK3)),
    "falcon": Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "bloom poro-chat gpt3-finnish": Splitting((_POINTS,)),
    "viking": Splitting((_POINTS, _DIGIT)),
    "superbpe": Splitting((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "bailingmoe bailingmoe2 llada-moe": Splitting((_BAILING,)),
    "seed-coder": Splitting((_SEED,)),
}
"""Rules by the names that llama.cpp has for them in `tokenizer.ggml.pre`.

The patterns are those of the models' own tokenizer.json, as llama.cpp's
`src/llama-vocab.cpp` cites or approximates them.
"""

SPLITTINGS: Mapping[str, Splitting] = {
    name: rule for names, rule in _NAMES.items() for name in names.split()
}

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

    Args:
        metadata: All of the file's keys and values.
        origin: Where they come from, for messages.

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
