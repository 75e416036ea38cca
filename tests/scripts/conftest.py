"""A tiny teacher in a Hugging Face folder, a little text, and the script's `main`."""

import importlib
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    f"The {animal} {verb} the {thing} and then it {other} {number} times."
    for animal in ("cat", "dog", "bird", "horse", "mouse")
    for verb in ("sees", "takes", "likes", "leaves")
    for thing in ("house", "ball", "river")
    for other, number in (("sleeps", "two"), ("runs", "seven"))
]


@pytest.fixture(scope="session")
def load_script():
    """`load_script(name)`: the module of a command, by its name or its script's."""
    names = {"train_tpu": "train", "prepare_data": "prepare", "store_teacher": "store"}

    def load(name):
        return importlib.import_module(f"taid_jax.cli.{names.get(name, name)}")

    return load


@pytest.fixture(scope="session")
def train_tpu(load_script):
    """The command `train` as a module."""
    return load_script("train")


@pytest.fixture(autouse=True, scope="session")
def compile_cache():
    """The script moves the compile cache; here it moves to where it is already."""
    folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is fetched in these tests; only the compile cache is looked for here.
        patch.setenv("TAID_JAX_CACHE", str(folder / "scripts"))
        yield
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _tokenizer(vocab_size=300):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """A function: a random Llama folder with its tokenizer, its config changed."""
    from taid_jax.models.config import DecoderConfig
    from taid_jax.models.decoder import init_params
    from taid_jax.models.files.load import export_model

    def make(layers=4, vocab_size=300, seed=0, **changes):
        tokenizer = _tokenizer(vocab_size)
        shape = {
            "d_model": 16,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "mlp_dim": 32,
            "max_position_embeddings": 64,
        } | changes
        config = DecoderConfig(
            vocab_size=len(tokenizer),
            num_layers=layers,
            tie_embeddings=True,
            initializer_range=0.3,
            **shape,
        )
        folder = tmp_path_factory.mktemp("model") / "folder"
        params = init_params(config, jax.random.key(seed))
        export_model(folder, config, params, tokenizer)
        return folder

    return make


@pytest.fixture(scope="session")
def teacher(make_model):
    return make_model()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of text files, each a document."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(0, len(SENTENCES), 4):
        text = " ".join(SENTENCES[index : index + 4])
        (folder / f"{index:03}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Questions whose answers the words of the tiny tokenizer can write."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    records = [
        {
            "prompt": f"Where does the {animal} go, {number}?",
            "completion": f" The {animal} takes the {thing}.",
        }
        for animal in ("cat", "dog", "bird", "horse", "mouse")
        for number, thing in enumerate(("house", "ball", "river") * 4)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def finished(train_tpu, teacher, text, tmp_path_factory):
    """The folder of a run that went to its end: that of `arguments`."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train_tpu.main(_arguments(teacher, text, folder)) == 0
    return folder


@pytest.fixture(scope="session")
def lines_of():
    """`lines_of(path)`: what the lines of a file of JSON say."""
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def rows_of(lines_of):
    """`rows_of(folder)`: a run's lines of metrics, but for what the clock says."""
    from taid_jax.train.throughput import MEASURED

    def rows(folder, first=1):
        return [
            {k: v for k, v in row.items() if k not in MEASURED}
            for row in lines_of(folder / "metrics.jsonl")
            if row["step"] >= first
        ]

    return rows


@pytest.fixture(scope="session")
def same_student():
    """`same_student(folder, other)`: both runs have exported the same weights."""

    def compare(*folders):
        paths = [folder / "student" / "model.safetensors" for folder in folders]
        found, expected = map(load_file, paths)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)

    return compare


@pytest.fixture(scope="session")
def same_run(lines_of, rows_of, same_student):
    """`same_run(folder, other)`: both runs have the same figures and weights."""

    def compare(*folders):
        for found in (
            map(rows_of, folders),
            (lines_of(folder / "evaluations.jsonl") for folder in folders),
        ):
            one, other = found
            assert one == other
        same_student(*folders)

    return compare


@pytest.fixture(scope="module")
def small_model(make_model):
    """Another model than the teacher, of two layers."""
    return make_model(layers=2, seed=3)


@pytest.fixture(scope="module")
def train_small(train_tpu, small_model, questions, tmp_path_factory):
    """`train_small(*flags)`: the folder of a run of it on the questions."""

    def run(*flags, folder=None):
        folder = folder or tmp_path_factory.mktemp("small") / "run"
        arguments = [
            f"--student={small_model}",
            f"--data={questions}",
            f"--output={folder}",
            "--steps=4",
            "--batch-size=8",
            "--seq-len=48",
            "--eval-every=2",
            "--save-every=2",
            "--held-out-fraction=0.3",
            "--learning-rate=0.01",
        ]
        assert train_tpu.main([*arguments, *flags]) == 0
        return folder

    return run


@pytest.fixture
def arguments(teacher, text, tmp_path):
    """Flags of a run of a few seconds."""
    return _arguments(teacher, text, tmp_path / "run")


def _arguments(teacher, text, output):
    return [
        f"--teacher={teacher}",
        "--student-layers=2",
        f"--data={text}",
        f"--output={output}",
        "--steps=12",
        "--batch-size=8",
        "--seq-len=16",
        "--eval-every=4",
        "--save-every=3",
        "--held-out-fraction=0.3",
        "--learning-rate=0.01",
    ]
