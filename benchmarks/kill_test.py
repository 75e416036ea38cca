"""Kills a run again and again, and checks that it ends as if nothing had happened.

A tiny model is trained twice by scripts/train_tpu.py: once in one go, and once killed
by SIGKILL at random moments, half of them while a checkpoint is being written, and
started again with --resume. Both must end with the same state, bit for bit, and with
the same exported student and metrics.
"""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from taid_jax.data.corpus import pydoc_sections
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import init_params
from taid_jax.models.files.load import export_model

TRAIN = pathlib.Path(__file__).parents[1] / "scripts" / "train_tpu.py"
CHARACTERS = 40_000
# What depends on the clock.
MEASURED = (
    "loss",
    "kl_teacher",
    "t",
    "delta_t",
    "learning_rate",
    "grad_norm",
    "tokens",
)
# Steps before the end that are left for a kill to arrive in.
MARGIN = 10
UNFINISHED = "*.orbax-checkpoint-tmp*"


@dataclasses.dataclass(frozen=True)
class KillTest:
    """The flags.

    Attributes:
        times: How often the run is killed.
        output: A folder for all of it; must not exist.
        steps: Of the run; enough for it to be killed so often.
        save_every: Steps between checkpoints.
        seed: Of the moments.
        limit: Seconds that one start may take until its first step.
    """

    times: int = 30
    output: str = "runs/kill_test"
    steps: int = 300
    save_every: int = 3
    seed: int = 0
    limit: float = 300.0


class BrokenError(Exception):
    """A run did not end as it should."""


def make_inputs(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns a tiny teacher with random weights, and a little text."""
    sections = [text for _, text in pydoc_sections()]
    texts = folder / "text"
    texts.mkdir(parents=True)
    for number, text in enumerate(sections):
        if sum(len(other) for other in sections[:number]) < CHARACTERS:
            (texts / f"{number:03}.txt").write_text(text, encoding="utf-8")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(sections, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    config = DecoderConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        num_layers=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mlp_dim=64,
        max_position_embeddings=64,
        tie_embeddings=True,
        initializer_range=0.3,
    )
    params = init_params(config, jax.random.key(0))
    export_model(folder / "teacher", config, params, tokenizer)
    return folder / "teacher", texts


class Victim:
    """A run that is started, killed and started again."""

    def __init__(self, flags: Sequence[str], folder: pathlib.Path, limit: float):
        self.folder, self._limit = folder, limit
        self._command = [sys.executable, str(TRAIN), *flags, f"--output={folder}"]
        self._log = folder.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> int:
        """Starts it, anew or from its last checkpoint; returns that step."""
        saved = self.saved()
        if not saved:  # What is counted then are the lines of this start.
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        resume = ["--resume"] if self.folder.exists() else []
        environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1")
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command + resume, stdout=log, stderr=log, env=environment
            )
        return max(saved, default=0)

    def saved(self) -> list[int]:
        """Returns the steps of its whole checkpoints."""
        names = [path.name for path in self.folder.glob("checkpoints/*")]
        return [int(name) for name in names if name.isdecimal()]

    def lines(self) -> list[dict[str, Any]]:
        """Returns the metrics that are written."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def until(self, happened: Any) -> bool:
        """Waits until something is so; returns False if the run ended before."""
        if self.process is None:
            raise BrokenError("not started")
        deadline = time.monotonic() + self._limit
        while not happened():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise BrokenError(f"nothing happened for {self._limit} s: {self._log}")
            time.sleep(0.001)
        return True

    def finish(self) -> int:
        """Lets it run to its end; returns its exit status."""
        if self.process is None:
            raise BrokenError("not started")
        return self.process.wait()


def torment(victim: Victim, settings: KillTest) -> dict[str, Any]:
    """Kills the run `settings.times` times; returns what was seen."""
    chance = random.Random(settings.seed)
    during_saves, lost, saves = 0, [], victim.folder / "checkpoints"
    for number in range(settings.times):
        begun = victim.start()
        alive = victim.until(lambda begun=begun: len(victim.lines()) > begun)
        # Of the steps that are left, about as many for each start that is left.
        left, starts = settings.steps - begun - MARGIN, settings.times - number + 1
        target = chance.randint(1, max(1, min(left, 2 * left // starts)))
        alive &= victim.until(
            lambda begun=begun, target=target: len(victim.lines()) >= begun + target
        )
        if number % 2:
            alive &= victim.until(lambda: any(saves.glob(UNFINISHED)))
        time.sleep(chance.random() * 0.02)
        if not alive or victim.process is None:
            status = victim.finish()
            raise BrokenError(
                f"the run ended with status {status} before kill {number + 1}: give "
                f"more --steps, or see {victim.folder.with_suffix('.log')}"
            )
        victim.process.kill()
        victim.finish()
        during_saves += any(saves.glob(UNFINISHED))
        done = len(victim.lines())
        kept = victim.saved()
        lost.append(done - max(kept, default=0))
        print(
            f"kill {number + 1}/{settings.times}: after step {done}, last checkpoint "
            f"{max(kept, default='none')}",
            flush=True,
        )
    return {"kills": settings.times, "during_saves": during_saves, "steps_lost": lost}


def differences(first: pathlib.Path, second: pathlib.Path, steps: int) -> list[str]:
    """Returns in what two finished runs differ."""
    with ocp.StandardCheckpointer() as reader:
        states = [
            reader.restore((folder / "checkpoints" / str(steps) / "state").absolute())
            for folder in (first, second)
        ]
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(states[0]),
        jax.tree_util.tree_leaves_with_path(states[1]),
        strict=True,
    )
    found = [
        jax.tree_util.keystr(path)
        for (path, one), (_, other) in pairs
        if np.asarray(one).tobytes() != np.asarray(other).tobytes()
    ]
    found += [
        name
        for name in ("student/model.safetensors", "evaluations.jsonl")
        if (first / name).read_bytes() != (second / name).read_bytes()
    ]
    rows = [
        [{key: row.get(key) for key in MEASURED} for row in Victim([], at, 0).lines()]
        for at in (first, second)
    ]
    return found + ["metrics.jsonl"] * (rows[0] != rows[1])


def main(arguments: Sequence[str]) -> int:
    """Runs the test and returns its exit status: 0 if nothing differs."""
    settings = tyro.cli(KillTest, args=arguments, description=__doc__)
    folder = pathlib.Path(settings.output).absolute()
    if folder.exists():
        print(f"error: {folder} is there; choose another --output", file=sys.stderr)
        return 2
    teacher, text = make_inputs(folder)
    flags = [
        f"--teacher={teacher}",
        "--student-layers=2",
        f"--data={text}",
        f"--steps={settings.steps}",
        "--batch-size=4",
        "--seq-len=32",
        "--eval-every=0",
        "--held-out-batches=2",
        f"--save-every={settings.save_every}",
        "--cluster=none",
    ]
    try:
        whole = Victim(flags, folder / "whole", settings.limit)
        whole.start()
        if whole.finish():
            raise BrokenError(f"the run in one go failed: {folder / 'whole.log'}")
        victim = Victim(flags, folder / "killed", settings.limit)
        seen = torment(victim, settings)
        seen["resumed_last_at"] = victim.start()
        if victim.finish():
            raise BrokenError(f"the last start failed: {folder / 'killed.log'}")
    except BrokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seen["differences"] = differences(whole.folder, victim.folder, settings.steps)
    (folder / "kill_test.json").write_text(json.dumps(seen, indent=2) + "\n")
    print(json.dumps(seen))
    return 1 if seen["differences"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
