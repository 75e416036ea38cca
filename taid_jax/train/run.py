"""A whole run: from settings to a trained student, its report and its picture."""

import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from taid_jax import distributed
from taid_jax.data import Dataset
from taid_jax.evaluate import HeldOut, cost
from taid_jax.models.load import export_model
from taid_jax.settings import Settings, to_dict, to_json, with_steps
from taid_jax.sharding import check_batch, make_mesh
from taid_jax.train.answers import find_questions
from taid_jax.train.assemble import assemble
from taid_jax.train.checkpoint import Checkpoints
from taid_jax.train.inputs import (
    Pair,
    check_models,
    load_pair,
    read_data,
    refuse_contradictions,
    share_output,
)
from taid_jax.train.judge import make_judge
from taid_jax.train.loop import Loop, TrainingError
from taid_jax.train.progress import ConsoleProgress
from taid_jax.train.report import (
    CURVES,
    EVALUATIONS,
    METRICS,
    REPORT,
    draw_curves,
    peak_memory,
    read_lines,
    write_json,
)
from taid_jax.train.samplers import make_sampler
from taid_jax.train.samples import show_samples
from taid_jax.train.state import DistillState, not_finite
from taid_jax.train.utilisation import summarize
from taid_jax.types import Params

_PROBLEMS = 5
"""So many records that cannot be used are shown with their line; all are counted."""


def distil(settings: Settings, console: Console) -> dict[str, Any]:
    """Runs a whole distillation and returns its report.

    Of several processes each calls this; process 0 alone writes and prints.

    Everything that can be wrong with the input is looked at before the weights are read
    and before anything is compiled.

    Args:
        settings: Of the run.
        console: Where progress is shown.

    Returns:
        What `report.json` says: `teacher_perplexity`, `student_perplexity_before`,
        `student_perplexity_after`, `kl_before`, `kl_after`, `seconds`, `settings`, ...

    Raises:
        SettingsError: If settings contradict each other, the machine or a checkpoint.
        ModelError: If a model cannot be used.
        DataError: If the data cannot be used.
        TrainingError: If training stopped because of non-finite steps, or no state
            that was evaluated is finite.
        Interrupted: If a signal stopped it; the state is saved.
        DistributedError: If the processes disagree in settings or data.
    """
    began = time.perf_counter()
    distributed.agree_on_settings(settings)
    mesh = make_mesh(settings.run.mesh)
    check_batch(settings.data.batch_size // settings.optimizer.grad_accum, mesh)
    folder = share_output(settings)
    tokenizer = check_models(settings.model, settings.data.seq_len)
    dataset = read_data(settings, tokenizer)
    distributed.agree("data", dataclasses.asdict(dataset.info))
    settings = with_steps(settings, len(dataset.train))
    questions = find_questions(dataset.held_out, settings.judge.answer_examples)
    checkpoints = Checkpoints(folder / "checkpoints", keep=settings.run.keep)
    if settings.run.resume:
        refuse_contradictions(checkpoints.settings(), settings)
    pair = load_pair(settings, mesh)
    describe(pair, dataset, mesh, console)
    if distributed.is_main_process():
        path = folder / "settings.json"
        path.write_text(to_json(settings) + "\n", encoding="utf-8")

    judge = make_judge(
        settings, pair, dataset, mesh, tokenizer=tokenizer, questions=questions
    )
    sampler = make_sampler(settings, pair, dataset, tokenizer, mesh)
    loop, state = assemble(
        settings, folder, pair, dataset, checkpoints, mesh, judge, sampler
    )
    with ConsoleProgress(console, settings.run.steps, int(state.step)) as progress:
        loop.progress = progress
        state = loop.run(state)
    state, found = best_state(loop, state)
    checkpoints.close()

    params = distributed.gather(state.params)

    def publish() -> dict[str, Any]:
        export_model(
            folder / "student",
            pair.student_config,
            params,
            tokenizer,
            generation=pair.teacher.generation,
            replace=settings.run.resume,
        )
        evaluations = read_lines(folder / EVALUATIONS)
        metrics = read_lines(folder / METRICS)
        report = {
            **summary(evaluations, found),
            "seconds": round(time.perf_counter() - began, 1),
            "tokens_per_second": median_rate(metrics),
            "utilisation": summarize(loop.meter, metrics),
            "peak_memory_bytes": peak_memory(),
            "held_out_tokens": evaluations[0]["tokens"],
            "settings": to_dict(settings),
        }
        write_json(folder / REPORT, report)
        draw_curves(
            folder / CURVES,
            metrics,
            evaluations,
            title=f"{settings.objective.objective}: {settings.model.teacher} -> "
            f"{pair.student_config.num_layers} layers",
        )
        return report

    report = distributed.broadcast(publish)
    show_samples(settings, pair, state.params, dataset, tokenizer, console)
    return report


def describe(pair: Pair, dataset: Dataset, mesh: Mesh, console: Console) -> None:
    """Prints what is about to be trained, and where."""

    def size(params: Params) -> str:
        return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters"

    axes = ", ".join(f"{axis}={count}" for axis, count in mesh.shape.items())
    sides = {"training": dataset.info.train, "held out": dataset.info.held_out}
    dropped = ", ".join(f"{n} {reason}" for reason, n in dataset.info.dropped.items())
    for line in (
        f"teacher: {pair.teacher.config.num_layers} layers, "
        f"{size(pair.teacher.params)}",
        f"student: {pair.student_config.num_layers} layers, "
        f"{size(pair.student_params)}",
        *(
            f"{name}: {side.documents} documents, {side.tokens:,} tokens in "
            f"{side.rows} rows"
            for name, side in sides.items()
        ),
        f"left out: {dropped or 'nothing'}",
        *(f"  {problem}" for problem in dataset.info.problems[:_PROBLEMS]),
        f"devices: {mesh.size} x {jax.devices()[0].device_kind} ({axes})",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def best_state(loop: Loop, state: DistillState) -> tuple[DistillState, HeldOut]:
    """Returns the state that was judged the best, and what was found of it.

    Raises:
        TrainingError: If no evaluation, or not its state, is finite.
    """
    best_by = loop.settings.judge.best_by
    here = int(state.step)
    kept = {here, *loop.checkpoints.steps()}
    rows = distributed.broadcast(lambda: read_lines(loop.folder / EVALUATIONS))
    # Of equals the last: exact match is often 0 throughout.
    best = min(
        (row for row in rows if row["step"] > 0 and row["step"] in kept),
        key=lambda row: (cost(row, best_by), -row["step"]),
    )
    if best["step"] != here:
        state = loop.checkpoints.restore(state, best["step"]).state
    if math.isinf(cost(best, best_by)) or not_finite(state.params):
        raise TrainingError(
            f"nothing was exported: no state that was evaluated has a finite {best_by} "
            f"and finite weights. The last checkpoint is {max(kept)} in "
            f"{loop.checkpoints.folder}; its figures are in {EVALUATIONS}"
        )
    values: dict[str, Any] = {key: best.get(key) for key in HeldOut._fields}
    return state, HeldOut(**values)


def summary(evaluations: list[dict[str, Any]], found: HeldOut) -> dict[str, Any]:
    """Returns KL, perplexities and what else was judged, before and after."""
    before = evaluations[0]
    others = {
        f"{key}_{when}": row[key]
        for key in ("loss", "rouge_l", "exact_match")
        for when, row in (("before", before), ("after", found._asdict()))
        if row.get(key) is not None
    }
    return {
        "teacher_perplexity": found.teacher_perplexity,
        "student_perplexity_before": before["student_perplexity"],
        "student_perplexity_after": found.student_perplexity,
        "kl_before": before["kl"],
        "kl_after": found.kl,
        **others,
    }


def median_rate(rows: list[dict[str, Any]]) -> float | None:
    """Returns the median of the logged tokens per second."""
    rates = [row["tokens_per_second"] for row in rows]
    return round(float(np.median(rates)), 1) if rates else None
