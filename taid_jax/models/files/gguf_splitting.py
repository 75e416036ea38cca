"""How byte-level tokenizers cut text, by the names that llama.cpp has for the rules."""

from collections.abc import Mapping
from typing import NamedTuple


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
