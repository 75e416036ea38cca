"""Small tokenizers made on the spot, and files to read: nothing is downloaded."""

import copy
import json
import random

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The cat sat on the mat, and then it said: that is all.",
    "Whether the weather is fine or not, we count every token once.",
    "A student learns from a teacher step by step; the teacher never moves.",
    "for i in range(10):\n    print(i)\n\nreturn value",
    "Many\n\n\n\nlines\n\n\nbetween.",
    "Größe, naïve, 東京 and 🙂 are words too.",
]

# The five formats as their makers document them, written out for these tests.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
        "+ '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' "
        "+ (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "llama3": (
        "{% for m in messages %}{{ (bos_token if loop.first else '') "
        "+ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
        "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] "
        "+ '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] "
        "+ eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
ENDS = {
    "chatml": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "phi3": "<|end|>",
    "zephyr": "</s>",
}
_ADDED = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama2": ["<s>", "</s>"],
    "llama3": ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "phi3": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"],
    "zephyr": ["<s>", "</s>"],
}


def build_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """A tokenizer in the way of the style: byte-level, or like SentencePiece."""
    words = [*SENTENCES, "system user assistant INST /INST <<SYS>> <| |>"] * 4
    if style in ("chatml", "llama3"):
        backend = Backend(models.BPE())
        # Offsets without the leading space, as GPT-2's kind has them.
        byte_level = pre_tokenizers.ByteLevel(
            add_prefix_space=False, trim_offsets=True, use_regex=style == "chatml"
        )
        # Llama 3 keeps line ends together, GPT-2 leaves the last one to what follows.
        words_first = pre_tokenizers.Split(
            Regex(r" ?\w+| ?[^\s\w]+|\s*\n+|\s+(?!\S)|\s+"), "isolated"
        )
        backend.pre_tokenizer = (
            byte_level
            if style == "chatml"
            else pre_tokenizers.Sequence([words_first, byte_level])
        )
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        added = []
    else:
        backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True))
        # Line ends are bytes of their own there.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("\n", "isolated"),
                pre_tokenizers.Metaspace(prepend_scheme="first"),
            ]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = []
        added = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=added,
    )
    backend.train_from_iterator(words, trainer)
    if added:
        # Bytes are ordinary entries there, not tokens that are found in text.
        vocab = json.loads(backend.to_str())["model"]
        plain = Backend(
            models.BPE(
                vocab=vocab["vocab"],
                merges=[tuple(merge) for merge in vocab["merges"]],
                byte_fallback=True,
                fuse_unk=True,
            )
        )
        plain.pre_tokenizer, plain.decoder = backend.pre_tokenizer, backend.decoder
        backend = plain
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in _ADDED[style]]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if "<s>" in _ADDED[style] else None,
        eos_token="<|endoftext|>" if style == "phi3" else ENDS[style],
    )
    tokenizer.chat_template = TEMPLATES[style]
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers():
    return {style: build_tokenizer(style) for style in TEMPLATES}


@pytest.fixture(params=list(TEMPLATES))
def style(request):
    return request.param


@pytest.fixture
def turn_end(style):
    return ENDS[style]


@pytest.fixture
def styled_tokenizer(style, tokenizers):
    return tokenizers[style]


@pytest.fixture(scope="session")
def tokenizer(tokenizers):
    return tokenizers["chatml"]


@pytest.fixture
def base_tokenizer(tokenizer):
    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    return base


@pytest.fixture
def write_jsonl(tmp_path):
    def write(records, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def make_conversations():
    """Conversations whose answers look like prompts, roles and white space."""

    def make(count, *, seed=0, edges=("", "", "", " ", "\n", "\n\n", "  ", "\t")):
        draw = random.Random(seed)
        words = [*" ".join(SENTENCES).split(), "a", "user", "assistant", "sys:", "-"]

        def text():
            inner = "".join(
                draw.choice(words) + draw.choice([" ", " ", " ", "\n", "\n\n"])
                for _ in range(draw.randint(1, 12))
            ).strip()
            return draw.choice(edges) + inner + draw.choice(edges)

        conversations = []
        for _ in range(count):
            messages = []
            if draw.random() < 0.4:
                messages.append({"role": "system", "content": text()})
            for _ in range(draw.randint(1, 4)):
                messages.append({"role": "user", "content": text()})
                messages.append({"role": "assistant", "content": text()})
            if draw.random() < 0.2:  # an answer said before, and once more
                messages.append({"role": "user", "content": text()})
                messages.append(
                    {"role": "assistant", "content": messages[1]["content"]}
                )
            conversations.append(messages)
        return conversations

    return make
