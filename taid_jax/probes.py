"""Texts on which tokenizers show how they cut: what two of them are compared by."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

Encode = Callable[[list[str]], Sequence[Sequence[int]]]
"""Texts to ids, without start and end tokens."""

TEXTS = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'll say we've done what you'd want, isn't it?",
    "I'M SURE THEY'LL SAY WE'VE DONE WHAT YOU'D WANT, ISN'T IT?",
    "don\u2019t \u201cquote\u201d \u2018me\u2019 \u2013 or \u2014 \u2026",
    "7 42 365 1984 31415 1234567890 12345678901234567890",
    "3.14159 1,000,000 1e-9 0x1F 10% $5.00 2\u00b2 \u00bd \u2167 \u0663\u0664\u0665",
    "year2024 v1.2.3 a1b22c333d4444",
    "x  1 y   22 z\t333 w\n4444",
    "two  spaces   three    four     five end",
    "trailing spaces   ",
    "tab\tand\t\ttabs \t mixed\t ",
    "one\ntwo\n\nthree\n\n\nfour\n\n\n\nfive",
    "line \nend  \n \n  indented\n\t\n\ttabbed\r\nwindows\r\n\r\nlines\rold",
    "def f(x, *, y=1):\n    return {'a': [x**2 // 3, -y], \"b\": x != y}  # why?\n",
    "if (a<=b&&c>>=1) { x->y[i++] = ~z; } /* //path/to\\file */",
    "https://example.org/a_b-c/?q=1&r=%20#top me@example.org <b>tag</b>",
    "...!!!???---___===***###@ ~`^|\\ ({[<>]})",
    "camelCaseWordsHTTPServer SHOUTING MiXeD iPhone McDonald",
    "na\u00efve caf\u00e9 Gr\u00f6\u00dfe \u00c5ngstr\u00f6m \u00c9COLE \u0130stanbul",
    "nai\u0308ve cafe\u0301 A\u030angstro\u0308m",  # the same, decomposed
    "\u1112\u1161\u11ab \ud55c e\u0301\u0327 \ufb01 \u2460 \uff21 \u212b \u00aa",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0395\u03bb\u03bb",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002"
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u30ab\u30bf\u30ab\u30ca "
    "\ud55c\uad6d\uc5b4 \u4e2d\u6587abc123",
    "\U0001f642 \U0001f44d\U0001f3fd "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "zero\u200bwidth no\u00a0break thin\u2009space wide\u3000space bom\ufeff s\u00ad",
    "\U0001d518\U0001d52b \U00020000 \ue000 control\x01\x7f null\x00",
    "zzzzzzzzzzzzzzzz aaaaaaaa qxjkv hhhmmmm",
)
"""What tokenizers are known to cut in different ways, after a plain first word."""

EDGES = (
    " leading space",
    "  two leading spaces",
    "\tleading tab",
    "\nleading line",
    "\n\n  both",
    " ",
    "   ",
    "\n",
)
"""How a text may begin: a GGUF file does not say what a tokenizer does with that."""

_ALONE = 20_000
_JOINED = 64


def _byte_alphabet() -> dict[str, int]:
    """Returns the characters that byte-level tokenizers write bytes as (GPT-2's)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = [byte for byte in range(256) if byte not in plain]
    shown = {chr(byte): byte for byte in plain}
    return shown | {chr(256 + place): byte for place, byte in enumerate(rest)}


BYTE_ALPHABET = _byte_alphabet()


def vocabulary_texts(
    vocabulary: Mapping[str, int], *, without: Collection[str]
) -> list[str]:
    """Returns texts made of a vocabulary's tokens, which show how it merges.

    Single tokens (at most 20,000, evenly taken), and all of them in a row. Equal for
    equal vocabularies, whatever else the tokenizers do.

    Args:
        vocabulary: Tokens and their ids.
        without: Tokens that are not learned from text.
    """
    learned = vocabulary.keys() - set(without)
    texts = [
        text
        for token in sorted(learned, key=lambda token: (vocabulary[token], token))
        if (text := _text_of(token))
    ]
    alone = texts[:: -(-len(texts) // _ALONE) or 1]
    rows = range(0, len(texts), _JOINED)
    joined = ["".join(texts[start : start + _JOINED]) for start in rows]
    # A plain letter first: see `EDGES`.
    return [f"a{text}" if text[0].isspace() else text for text in alone + joined]


def _text_of(token: str) -> str:
    try:
        return bytes(BYTE_ALPHABET[sign] for sign in token).decode()
    except (KeyError, UnicodeDecodeError):
        return token.replace("\u2581", " ")


def first_difference(one: Encode, other: Encode, texts: Iterable[str]) -> str | None:
    """Returns the first text that two encoders give other ids, or None."""
    given = list(texts)
    pairs = zip(given, one(given), other(given), strict=True)
    return next((text for text, a, b in pairs if list(a) != list(b)), None)
