"""Mutated files of models and settings: read, or refused as an input; nothing else.

Each case is made from its number alone, so that a failure can be had again. None may
hang, take more than a GiB, or say more than a message can.
"""

import contextlib
import copy
import dataclasses
import json
import math
import random
import resource
import signal

import numpy as np
import pytest

from taid_jax.errors import InputError
from taid_jax.models.families import (
    FAMILIES,
    family_named,
    read_config,
    write_config,
)
from taid_jax.models.files.export import export_model
from taid_jax.models.files.gguf import open_gguf
from taid_jax.models.files.gguf_config import read_gguf_config
from taid_jax.models.files.hf import INDEX, WEIGHTS, open_folder
from taid_jax.models.files.load import load_config
from taid_jax.models.files.tokenizer import gguf_tokenizer
from taid_jax.models.files.weights import check_tensors, own_head
from taid_jax.models.rope import rope_frequencies
from taid_jax.settings import Settings, read_settings, to_dict

CASES = 100_000
SECONDS = 10
BYTES = 1 << 30
MOST_SHOWN = 4000

NUMBERS = [
    *(0, 1, -1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30),
    *(10**400, 0.0, -0.0, 0.5, 1e-300, 5e-324, 1e-30, 1e30, 1e308, -1e308, 1 + 1e-16),
    *(math.nan, math.inf, -math.inf),
]
VALUES = [
    *NUMBERS,
    *(True, False, None, "", "x", "0", "1e400", "llama", "\ud800", "\0", "ü" * 999),
    *([], {}, [[]], [0] * 50, [None], ["x" * 9999], {"a": 1}, {"": None}, "x" * 9999),
]
FIELDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


class HangError(BaseException):
    """No Exception, so that nothing on the way takes it for one of a parser."""


@contextlib.contextmanager
def bounds():
    """Lets every case have a GiB and some seconds."""

    def stop(*_):
        raise HangError

    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def damage(rng, content):
    """Returns bytes with a few of them flipped, cut, moved or replaced."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        # Headers are where damage can be told.
        end = min(len(content), rng.choice([64, 1024, 1 << 30]))
        at = rng.randrange(end + 1)
        match rng.randrange(7):
            case 0 if content:
                content[min(at, len(content) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del content[at:]
            case 2:
                del content[at : at + rng.choice([1, 4, 8, 100])]
            case 3:
                content[at:at] = rng.randbytes(rng.choice([1, 4, 8, 100]))
            case 4:
                start = rng.randrange(end + 1)
                content[at:at] = content[start : start + rng.choice([4, 30, 300])]
            case 5:
                width = rng.choice([4, 8])
                field = rng.choice(FIELDS) % 256**width
                content[at : at + width] = field.to_bytes(width, "little")
            case _:
                digits = str(rng.choice(NUMBERS)).encode()
                content[at : at + rng.choice([0, 1, 4])] = digits
    return bytes(content)


def places(tree):
    """Yields every place of a tree of mappings and lists: its parent and its key."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def change(rng, tree):
    """Changes a few values of a tree: other numbers, other types, keys that move."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        found = list(places(tree))
        if not found:
            return
        parent, key = rng.choice(found)
        value = copy.deepcopy(parent[key])
        match rng.randrange(8):
            case 0:
                del parent[key]
            case 1:
                parent[key] = rng.choice([[value], {"x": value}, str(value)])
            case 2 if isinstance(parent, dict):
                other, inner = rng.choice(found)
                parent[str(key) + "_"] = copy.deepcopy(other[inner])
            case 3 if isinstance(parent, dict):
                parent[rng.choice(["strange", "\ud800", "x" * 999, ""])] = value
            case 4 if isinstance(value, int | float) and abs(value) < 1e300:
                factor = rng.choice([-1, 0.5, 2, 1e-9, 1e9])
                parent[key] = value * factor
            case _:
                parent[key] = copy.deepcopy(rng.choice(VALUES))


def as_json(rng, tree):
    """Returns a changed tree as JSON, whose bytes may be damaged or repeated too."""
    tree = json.loads(json.dumps(tree))
    change(rng, tree)
    text = json.dumps(tree, indent=rng.choice([None, 1]))
    match rng.randrange(12):
        case 0:
            return damage(rng, text.encode())
        case 1:
            depth = rng.choice([10, 100_000])
            return (text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}").encode()
        case 2:
            return (text[:-1] + "," + text[1:]).encode()
    return text.encode()


def as_yaml(rng, tree):
    """Returns changed settings as YAML, with what YAML alone can say."""
    # A few of them: the parser is slow.
    tree = {key: tree[key] for key in rng.sample(sorted(tree), 8)}
    change(rng, tree)
    # In JSON's words, which YAML has too; its own writer knows no lone surrogates.
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in tree.items()]
    text = "\n".join(lines) if rng.random() < 0.5 else json.dumps(tree)
    more = [
        *("!!int x", "!!float x", "!!binary x", "!!timestamp x", "!!set {a, b}"),
        *("!!python/object:os.system {}", "2026-99-99", "&a [*a]", "{{}: 1}"),
        *("? [1]\n: 2", "0b2", "1:99:99", "<<: 3", "*nothing", "- - - x", "%TAG"),
        "[" * 2000,
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "\n".join(
            f"{now}: &{now} [{', '.join(['*' + before] * 9)}]"
            for before, now in zip("abcdefghi", "bcdefghij", strict=True)
        ),
    ]
    match rng.randrange(6):
        case 0:
            return damage(rng, text.encode())
        case 1:
            return f"{text}\nsteps: {rng.choice(more)}\n".encode()
        case 2:
            return f"{rng.choice(more)}\n".encode()
    return text.encode()


SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 16,
}
SCALINGS = {
    "llama": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    "qwen2": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    | {"original_max_position_embeddings": 8},
    "mistral": {"type": "dynamic", "factor": 2.0},
    "olmo2": {"type": "linear", "factor": 2.0},
    "phi3": {"type": "longrope", "short_factor": [1.0, 1.5]}
    | {"long_factor": [2.0, 3.0], "original_max_position_embeddings": 8},
}


def check_config(config):
    """What is accepted can be computed with."""
    for rope in filter(None, config.ropes):
        assert np.isfinite(rope_frequencies(rope, config.head_dim)).all()


def read_all(tensors):
    for name, shape in tensors.shapes.items():
        tensors.read(name, tuple(slice(0, size) for size in shape))


@pytest.fixture(scope="module")
def readers(tmp_path_factory, random_params, write_gguf):
    """Kind of file to what mutates one of them, by a generator, and reads it."""
    root = tmp_path_factory.mktemp("fuzz")
    configs = []
    for family in FAMILIES:
        named = {"model_type": family.name, **SIZES}
        if family.name == "gpt2":
            named = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 1}
            named |= {"n_head": 2, "n_positions": 16}
        elif family.name == "gpt_neox":
            del named["num_key_value_heads"]
            named["rotary_pct"] = 0.5
        elif family.name == "stablelm":
            named["partial_rotary_factor"] = 0.5
        if family.name in SCALINGS:
            named["rope_scaling"] = SCALINGS[family.name]
        configs.append(write_config(read_config(named, family.name)))
    llama = read_config({"model_type": "llama", **SIZES}, "llama")
    params = random_params(llama)

    folder, sharded = root / "folder", root / "sharded"
    export_model(folder, llama, params)
    export_model(sharded, llama, params, max_shard_bytes=1000)
    weights = (folder / WEIGHTS).read_bytes()
    index = json.loads((sharded / INDEX).read_text())
    path = root / "model.gguf"
    keys = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.0,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
    }
    sizes = {**SIZES, "hidden_size": 32, "intermediate_size": 32}

    def tokens(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "ab", "<s>"])
        writer.add_token_types([1, 1, 1, 3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)

    write_gguf(path, **sizes, kind="Q8_0", tokens=tokens, keys=keys)
    model = path.read_bytes()
    family = family_named("llama")
    # The config ties head and embedding, so that the files' are compared.
    tied = dataclasses.replace(llama, tie_embeddings=True)

    def read_safetensors(rng):
        (folder / WEIGHTS).write_bytes(damage(rng, weights))
        tensors = open_folder(folder, family)
        read_all(tensors)
        config = own_head(tied, tensors)
        check_tensors(config, tensors, rng.choice([None, []]))

    def read_index(rng):
        (sharded / INDEX).write_bytes(as_json(rng, index))
        check_tensors(llama, open_folder(sharded, family))

    def read_gguf(rng):
        path.write_bytes(damage(rng, model))
        file = open_gguf(path)
        read_all(file)
        if (tokenizer := gguf_tokenizer(file.metadata, file.origin)) is not None:
            tokenizer("ab 1")
        check_config(config := read_gguf_config(file, rng.choice([None, []])))
        if config.num_layers == 1:
            check_tensors(config, file)

    def read_config_file(rng):
        (root / "config.json").write_bytes(as_json(rng, rng.choice(configs)))
        allow = rng.random() < 0.5
        check_config(load_config(root / "config.json", allow_unknown_keys=allow))

    settings = {
        name: value
        for group in to_dict(Settings()).values()
        for name, value in group.items()
    }

    def read_settings_file(rng):
        (root / "settings.yaml").write_bytes(as_yaml(rng, settings))
        read_settings(root / "settings.yaml")

    return {
        "safetensors": read_safetensors,
        "index": read_index,
        "gguf": read_gguf,
        "config": read_config_file,
        "settings": read_settings_file,
    }


KINDS = ["safetensors", "index", "gguf", "config", "settings"]


def outcome(read, rng):
    """Returns what reading a mutated file ended with; None when it was read."""
    try:
        read(rng)
    except BaseException as error:
        return error
    return None


def fuzz(read, kind, cases):
    """Returns how many of the cases were refused, and how many were read."""
    refused = 0
    with bounds():
        for case in cases:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            error = outcome(read, random.Random(f"{kind} {case}"))
            if error is None:
                continue
            refused += 1
            text = f"{type(error).__name__}: {error}"
            text.encode()  # A console can show it.
            where = f"{kind}, case {case}: {text[:MOST_SHOWN]}"
            if not isinstance(error, InputError):
                raise AssertionError(where) from error
            assert len(text) <= MOST_SHOWN, where
            assert not isinstance(error.__cause__, MemoryError), where
    return refused, len(cases) - refused


@pytest.mark.parametrize("kind", KINDS)
def test_readers_survive_mutations(readers, kind):
    refused, read = fuzz(readers[kind], kind, range(200))
    # Mutations that never, or only, break a file would show little.
    assert min(refused, read) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_readers_survive_very_many_mutations(readers, kind):
    # The parser of YAML, written in Python, takes most of a minute for these few.
    few = 2_000
    others = (CASES - few) // (len(KINDS) - 1)
    fuzz(readers[kind], kind, range(few if kind == "settings" else others))
