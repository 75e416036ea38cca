"""Does a student that learns on its own texts get over its own mistakes?

A task where that must show. A prompt has numbers to add one after the other, and the
digit to begin with; the answer has the sums so far, modulo six: `4 1 3 : 2` is
continued by `0 1 4`. The teacher has learned to slip: one digit of ten is any digit,
and the sums go on from it. The texts that students are given have no slips, as texts
that were looked through have none, and no sum above two. A student that takes over the
teacher's slips soon writes a five, where no text of the data has ever been. The teacher
knows how to go on from there; does the student?

Every student of a seed has the same start, trained on the data without a teacher. Then
each method trains it for as many steps, on texts of the data or on its own. Measured on
prompts that are in no training, with completions that are drawn, not the most probable:

- how many digits follow from the one before, as it was written, and the number to add;
- after a mistake that is put into an answer of the data, how probable the right digits
  are where the one before is above two;
- exposure bias: how much larger KL(teacher, student) of a token is on the student's own
  texts than on the data's, in nats (after Arora et al., 2022, arXiv:2204.01171, who
  divide by that on the data, which is next to nothing here).

Results are written after each run; the same command goes on where the last one ended:

    python docs/examples/drift.py --output runs/drift
"""

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from taid_jax.files import write_whole
from taid_jax.loss import ForwardKL
from taid_jax.models import (
    SamplingParams,
    export_model,
    generate,
    head,
    hidden_states,
    load_model,
    random_init,
)
from taid_jax.models.files.load import LoadedModel
from taid_jax.settings import from_dict
from taid_jax.study.figures import machine
from taid_jax.study.plan import Size
from taid_jax.study.texts import write_model
from taid_jax.train.report import read_json, write_json
from taid_jax.train.run import distil

STEPS, MODULUS, HIGHEST, SLIPS = 12, 6, 2, 0.1
"""Sums of an answer, what they are modulo of, the largest that students are shown; the
share of digits that the teacher draws at random."""

METHODS: dict[str, dict[str, Any]] = {
    "sft, data": {"objective": "sft"},
    "forward KL, data": {"objective": "forward_kl"},
    "reverse KL, data": {"objective": "reverse_kl"},
    "GKD": {"objective": "jensen_shannon", "teacher_weight": 0.1, "texts": "mixed:0.5"},
    "forward KL, student": {"objective": "forward_kl", "texts": "student"},
    "reverse KL, student": {"objective": "reverse_kl", "texts": "student"},
    "entropy-gated, student": {"objective": "entropy_gated", "texts": "student"},
}
"""Objective and texts of each method, as settings of a run."""

END, WORDS = "<|endoftext|>", [*map(str, range(MODULUS)), ":"]


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns `(count, 1 + 2 * STEPS)`: first digits, numbers to add, sums.

    No sum is above `HIGHEST`.
    """
    sums = rng.integers(0, HIGHEST + 1, (count, STEPS + 1))
    return np.concatenate([sums[:, :1], np.diff(sums) % MODULUS, sums[:, 1:]], axis=1)


def draw_with_slips(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns the same of any sums, and with slips."""
    rows = rng.integers(0, MODULUS, (count, 1 + 2 * STEPS))
    slips = rng.random((count, STEPS)) < SLIPS
    before = rows[:, 0]
    for place in range(STEPS):
        digit = rows[:, 1 + STEPS + place]  # At random.
        right = (before + rows[:, 1 + place]) % MODULUS
        before = np.where(slips[:, place], digit, right)
        rows[:, 1 + STEPS + place] = before
    return rows


def with_mistake(rows: np.ndarray) -> np.ndarray:
    """Returns answers with one wrong digit each, after which the sums go on rightly."""
    rng = np.random.default_rng(2)
    place = rng.integers(1, STEPS, len(rows))[:, None]
    digit = rng.integers(HIGHEST + 1, MODULUS, (len(rows), 1))
    sums = rows[:, STEPS + 1 :]
    moved = digit - np.take_along_axis(sums, place - 1, axis=1)
    return np.where(np.arange(STEPS) < place - 1, sums, (sums + moved) % MODULUS)


def prompt_of(row: np.ndarray) -> str:
    """Returns the text before the answer."""
    first, *added = row[: STEPS + 1]
    return " ".join(map(str, [*added, ":", first]))


def write_records(path: pathlib.Path, rows: np.ndarray) -> None:
    """Writes prompts and completions, a line each."""
    lines = [
        json.dumps(
            {
                "prompt": prompt_of(row),
                "completion": " " + " ".join(map(str, row[STEPS + 1 :])),
            }
        )
        for row in rows
    ]
    write_whole(path, ("\n".join(lines) + "\n").encode())


def tokenizer() -> Tokenizer:
    """Returns one token a word; ids of digits are the digits."""
    words = {word: number for number, word in enumerate([*WORDS, END])}
    found = Tokenizer(models.WordLevel(words, unk_token=END))  # pyright: ignore
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    found.add_special_tokens([END])
    return found


def figures_of(
    student_folder: pathlib.Path, teacher_folder: pathlib.Path, rows: np.ndarray
) -> dict[str, Any]:
    """Returns what is measured of a student on prompts with their right answers."""
    student, teacher = load_model(student_folder), load_model(teacher_folder)
    words = [prompt_of(row).split() for row in rows]
    prompts = jnp.asarray([[WORDS.index(w) for w in line] for line in words], jnp.int32)
    said = generate(
        student.params,
        student.config,
        prompts,
        jnp.ones_like(prompts),
        max_new_tokens=STEPS,
        eos_token_ids=(),
        pad_token_id=len(WORDS),
        sampling=SamplingParams(temperature=1.0),
        key=jax.random.key(1),
    ).tokens

    def outputs(model: LoadedModel, answers: jax.Array) -> jax.Array:
        batch = {"input_ids": jnp.concatenate([prompts, answers[:, :-1]], axis=1)}
        hidden = hidden_states(model.params, batch, model.config)
        logits = head(model.params, model.config).logits(hidden)
        return logits[:, prompts.shape[1] - 1 :]

    def divergence(answers: jax.Array) -> float:
        both = outputs(student, answers), outputs(teacher, answers)
        return float(jnp.mean(ForwardKL().metrics(*both)["kl_teacher"]))

    of_data, own = divergence(jnp.asarray(rows[:, STEPS + 1 :])), divergence(said)
    digits = np.asarray(said)
    before = np.concatenate([rows[:, :1], digits[:, :-1]], axis=1)
    follows = (before + rows[:, 1 : STEPS + 1]) % MODULUS == digits
    follows &= before < MODULUS

    wrong = with_mistake(rows)
    probable = jax.nn.softmax(outputs(student, jnp.asarray(wrong)))
    probable = np.take_along_axis(np.asarray(probable), wrong[..., None], axis=2)
    lost = np.zeros(wrong.shape, bool)
    lost[:, 1:] = wrong[:, :-1] > HIGHEST
    return {
        "follows": float(np.mean(follows)),
        "follows_by_place": np.mean(follows, axis=0).round(4).tolist(),
        "after_mistake": float(np.mean(probable[..., 0][lost])),
        "kl_data": of_data,
        "kl_own": own,
        "exposure_bias": own - of_data,
    }


class Drift:
    """The runs, each of which is done once.

    Args:
        args: From the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self._args, self._output = args, args.output.absolute()
        self._console = Console(stderr=True, quiet=True)
        rng = np.random.default_rng(0)
        self._output.mkdir(parents=True, exist_ok=True)
        for name, make in (("teacher", draw_with_slips), ("student", draw)):
            write_records(self._output / f"{name}.jsonl", make(rng, args.records))
        self.held_out = draw(rng, args.prompts)
        for name, size in (("teacher", args.teacher), ("student", args.student)):
            folder = self._output / "models" / name
            write_model(folder, Size(*size), tokenizer(), 64)

    def _train(self, name: str, steps: int, **settings: Any) -> pathlib.Path:
        """Trains a model, if that is not done yet, and returns its folder."""
        folder = self._output / "runs" / name
        if not (folder / "report.json").is_file():
            shared = {
                "output": str(folder),
                "steps": steps,
                "batch_size": self._args.batch_size,
                "seq_len": 2 * STEPS + 4,
                "pack": False,
                "held_out_batches": 1,
                "eval_every": 0,
                "save_every": 0,
                "eval_prompts": 0,
                "keep": 1,
                "log_every": 50,
                "warmup_steps": steps // 20,
                "resume": folder.is_dir(),
            }
            distil(from_dict({**shared, **settings}, strict=False), self._console)
        return folder / "student"

    def seconds(self) -> float:
        """Returns what all runs so far took."""
        reports = (self._output / "runs").glob("*/report.json")
        return round(sum(read_json(path)["seconds"] for path in reports), 1)

    def teacher(self) -> pathlib.Path:
        """Returns the teacher's folder."""
        start = self._output / "models" / "start"
        if not start.is_dir():
            made = random_init(self._output / "models" / "teacher", jax.random.key(0))
            export_model(start, made.config, made.params, made.tokenizer)
        return self._train(
            "teacher",
            self._args.teacher_steps,
            teacher=str(start),  # Only its tokenizer counts.
            student_config=str(self._output / "models" / "teacher"),
            data=str(self._output / "teacher.jsonl"),
            objective="sft",
            learning_rate=self._args.teacher_rate,
        )

    def student(self, method: str | None, seed: int) -> pathlib.Path:
        """Returns the folder of a student, or of its start when no method is given."""
        data = str(self._output / "student.jsonl")
        shared = {"teacher": str(self.teacher()), "data": data, "seed": seed}
        if method is None:
            return self._train(
                f"start-{seed}",
                self._args.start_steps,
                student_config=str(self._output / "models" / "student"),
                objective="sft",
                learning_rate=self._args.start_rate,
                **shared,
            )
        values = {**shared, **METHODS[method]}
        if "texts" in values:
            values |= {"completion_tokens": STEPS + 1}
        if values.get("texts") == "student":
            values |= {"rollout_batch": 4 * self._args.batch_size}
        return self._train(
            f"{method}-{seed}".replace(", ", "-").replace(" ", "-"),
            self._args.steps,
            student=str(self.student(None, seed)),
            learning_rate=self._args.rate,
            **values,
        )


def options(words: Sequence[str]) -> argparse.Namespace:
    """Returns the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("runs/drift")
    )
    parser.add_argument("--results", type=pathlib.Path, help="drift.json in the output")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    size = {"type": int, "nargs": 3, "metavar": ("LAYERS", "WIDTH", "HEADS")}
    parser.add_argument("--teacher", **size, default=[2, 128, 4])
    parser.add_argument("--student", **size, default=[1, 48, 4])
    parser.add_argument("--records", type=int, default=20000)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--teacher-rate", type=float, default=3e-3)
    parser.add_argument("--start-steps", type=int, default=2000)
    parser.add_argument("--start-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=2e-3)
    return parser.parse_args(words)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is missing, and returns and writes the results."""
    words = sys.argv[1:] if argv is None else argv
    args = options(words)
    drift, path = Drift(args), args.results or args.output / "drift.json"
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ("output", "results", "seeds", "methods")
    }
    results: dict[str, Any] = {
        "command": f"python docs/examples/drift.py {shlex.join(words)}".strip(),
        "machine": machine(),
        "seconds": 0.0,
        "steps": STEPS,
        "modulus": MODULUS,
        "highest": HIGHEST,
        "settings": settings,
        "runs": [],
    }
    if path.is_file():
        kept = read_json(path)
        if kept["settings"] != json.loads(json.dumps(settings)):
            raise SystemExit(
                f"{path}: has results of other settings; name another file"
            )
        results["runs"] = kept["runs"]
    teacher = drift.teacher()
    results["teacher"] = figures_of(teacher, teacher, drift.held_out)
    print("teacher", results["teacher"], flush=True)
    for seed in range(args.seeds):
        for method in ("start", *args.methods):
            key = {"method": method, "seed": seed, "tuning": False}
            if any(key.items() <= old.items() for old in results["runs"]):
                continue
            folder = drift.student(None if method == "start" else method, seed)
            figures = figures_of(folder, teacher, drift.held_out)
            results["runs"].append({**key, "figures": figures})
            results["seconds"] = drift.seconds()
            write_json(path, results)
            print(method, seed, figures, flush=True)
    return results


if __name__ == "__main__":
    main()
