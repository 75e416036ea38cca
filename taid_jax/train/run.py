"""A whole run: from settings to a trained student, its report and its picture."""

import contextlib
import dataclasses
import datetime
import math
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console

from taid_jax import distributed
from taid_jax.errors import ModelError, explain
from taid_jax.models.files.load import export_model
from taid_jax.settings import Settings, changed, to_dict, with_steps
from taid_jax.sharding import check_batch, make_mesh
from taid_jax.train.build import build_loop
from taid_jax.train.checkpoint import Checkpoints, find_fault, read_run
from taid_jax.train.evaluate import HeldOut, make_evaluator, selection_metric
from taid_jax.train.folder import CHECKPOINTS, SETTINGS, RunFolder, WriteError, way_on
from taid_jax.train.inputs import check_memory, check_models, read_data, template_date
from taid_jax.train.loop import Loop, TrainingError
from taid_jax.train.on_policy.build import with_answers
from taid_jax.train.on_policy.ends import export_generation
from taid_jax.train.on_policy.prompts import find_eval_prompts
from taid_jax.train.on_policy.rules import describe_prompts
from taid_jax.train.on_policy.texts import OnPolicyBatches
from taid_jax.train.pair import load_pair
from taid_jax.train.report import (
    CURVES,
    EVALUATIONS,
    METRICS,
    REPORT,
    ConsoleProgress,
    Lines,
    draw_curves,
    find_rows,
    peak_memory,
    read_lines,
    write_json,
)
from taid_jax.train.resume import (
    compare_runs,
    identify_models,
    look,
    refuse_other_models,
    set_aside_others,
)
from taid_jax.train.shown import Shown, describe, describe_left_out, teacher_names
from taid_jax.train.state import DistillState, nonfinite_leaves


def distil(settings: Settings, console: Console) -> dict[str, Any]:
    """Runs a whole distillation and returns its report.

    Of several processes each calls this; process 0 alone writes and prints.

    Everything that can be wrong with the input is looked at before the weights are read
    and before anything is compiled; nothing is written before all inputs are read.

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
        CheckpointError: If there is no sound checkpoint to go on from.
        TrainingError: If training stopped because of non-finite steps, or no state
            that was evaluated is finite.
        WriteError: If something cannot be written, with the way on.
        Interrupted: If a signal stopped it; the state is saved.
        DistributedError: If the processes disagree in settings or data.
    """
    output = RunFolder(settings.run)
    precision = jax.default_matmul_precision(settings.model.matmul_precision)
    with precision, contextlib.ExitStack() as open_things:
        open_things.callback(output.close)
        try:
            return _distil(settings, console, output, open_things)
        except (WriteError, OSError) as error:
            text = f"{explain(error)}. {way_on(output.path)}"
            raise WriteError(text) from error


def _distil(
    settings: Settings,
    console: Console,
    output: RunFolder,
    open_things: contextlib.ExitStack,
) -> dict[str, Any]:
    """As `distil`; what is open at its end is put into `open_things`."""
    began = time.perf_counter()
    distributed.agree_on_settings(settings)
    mesh = make_mesh(settings.run.mesh)
    check_batch(settings.data.batch_size // settings.optimizer.grad_accum, mesh)
    check_memory(settings, mesh)
    folder = output.path
    step = distributed.broadcast(lambda: look(output, settings))
    saved = None if step is None else read_run(folder / CHECKPOINTS / str(step))
    opened = check_models(
        settings.model, settings.data.seq_len, settings.data.teacher_len
    )
    given = settings.data.template_date
    if saved is not None:
        given = given or saved.settings.data.template_date
    # Texts with another day in them would not be those that are stored.
    given = given or template_date(opened.stores)
    # Process 0's: another may begin after midnight.
    date = distributed.broadcast(lambda: given or datetime.date.today().isoformat())
    data = dataclasses.replace(settings.data, template_date=date)
    settings = dataclasses.replace(settings, data=data)
    tokenizer = opened.tokenizer
    check_memory(settings, mesh, opened.stores)
    dataset = read_data(settings, tokenizer, opened.stores)
    distributed.agree("data", dataclasses.asdict(dataset.info))
    settings = with_steps(settings, len(dataset.train))
    if settings.on_policy.texts != "data":
        output.notes += describe_prompts(settings.on_policy, dataset.train)
    prompts = find_eval_prompts(dataset.held_out, settings.evaluation.eval_prompts)
    if saved is not None and step is not None:
        output.notes += compare_runs(saved, settings, dataset, step)
    pair = load_pair(settings, mesh, opened)
    models = distributed.broadcast(lambda: identify_models(pair))
    if saved is not None:
        refuse_other_models(saved.place.get("models", {}), models)
    dataset = with_answers(settings, pair, dataset, tokenizer, mesh)
    own = ", ".join(f"{name}={value}" for name, value in changed(settings).items())
    lines = describe(settings, pair, dataset, mesh)
    left_out = describe_left_out(dataset.info)
    for line in (f"settings: {own or 'the defaults'}", *lines, *left_out):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    notes = distributed.broadcast(lambda: make_ready(output, settings, step))
    for line in notes:
        console.print(f"note: {line}", soft_wrap=True, highlight=False, markup=False)
    if not folder.is_dir():
        raise distributed.DistributedError(
            f"output: process 0 has made {folder}, which is not on this host "
            f"({socket.gethostname()}); it has to be on storage that all hosts share"
        )
    checkpoints = open_things.enter_context(
        Checkpoints(folder / CHECKPOINTS, keep=settings.run.keep)
    )

    evaluator = make_evaluator(
        settings, pair, dataset, mesh, tokenizer=tokenizer, prompts=prompts
    )
    loop, state = build_loop(
        settings,
        folder,
        pair,
        dataset,
        checkpoints,
        mesh,
        evaluator,
        tokenizer,
        step,
        models,
    )
    shown = Shown(settings, folder, pair, dataset, tokenizer, mesh, lines)
    shown.begin(state, console)
    with shown.watched(console):
        with ConsoleProgress(console, settings.run.steps, int(state.step)) as progress:
            loop.progress = progress
            state = loop.run(state)
        state, best = best_state(loop, state)
    checkpoints.close()

    params = distributed.gather(state.params)
    batches, texts = loop.batches, {}
    if isinstance(batches, OnPolicyBatches):
        texts = {"texts": batches.summary(lambda ids: str(tokenizer.decode(ids)))}

    def publish() -> dict[str, Any]:
        export_model(
            folder / "student",
            pair.student_config,
            params,
            tokenizer,
            generation=export_generation(pair.generation, tokenizer, dataset),
            dtype=settings.model.export_dtype,
            replace=settings.run.resume,
        )
        evaluations = read_lines(folder / EVALUATIONS)
        metrics = read_lines(folder / METRICS)
        utilisation = loop.throughput.summary(metrics)
        rate = utilisation["tokens_per_second"]
        report = {
            **summary(evaluations, best),
            "exported_step": best["step"],
            "seconds": round(time.perf_counter() - began, 1),
            "tokens_per_second": rate and round(rate, 1),
            "utilisation": utilisation,
            "peak_memory_bytes": peak_memory(),
            "held_out_tokens": evaluations[0]["tokens"],
            "notes": list(pair.notes),
            "data": dataclasses.asdict(dataset.info),
            **texts,
            "settings": to_dict(settings),
        }
        write_json(folder / REPORT, report)
        draw_curves(
            folder / CURVES,
            metrics,
            evaluations,
            title=f"{settings.objective.objective}: {teacher_names(pair)} -> "
            f"{pair.student_config.num_layers} layers",
        )
        return report

    try:
        report = distributed.broadcast(publish)
    except ModelError as error:  # Of the student's folder; what was read is good.
        raise WriteError(str(error)) from error
    shown.end(state, console)
    return report


def make_ready(output: RunFolder, settings: Settings, step: int | None) -> list[str]:
    """Makes the folder of a run ready to be written into; returns lines about it.

    Raises:
        SettingsError: If it cannot be made, or another process holds it.
        WriteError: If it cannot be written.
    """
    output.claim()
    if step is not None:
        set_aside_others(output, step)
    for name in (METRICS, EVALUATIONS):
        rows, fault = find_rows(output.path / name)
        if fault:
            output.set_aside(output.path / name, fault)
            Lines(output.path / name, first_dropped=1 << 62, rows=rows).close()
    write_json(output.path / SETTINGS, to_dict(settings))
    return output.notes


def best_state(loop: Loop, state: DistillState) -> tuple[DistillState, dict[str, Any]]:
    """Returns the state that was found the best, and its row of the evaluations.

    Raises:
        TrainingError: If no evaluation, or not its state, is finite.
    """
    best_by = loop.settings.evaluation.selection_metric
    here = int(state.step)
    kept = {here, *loop.checkpoints.steps()}
    rows = distributed.broadcast(lambda: read_lines(loop.folder / EVALUATIONS))

    def sound(step: int) -> bool:
        place = loop.checkpoints.folder / str(step)
        fault = distributed.broadcast(lambda: find_fault(place))
        if fault:
            loop.progress.say(f"{place} {fault}: the next best student is exported")
        return not fault

    # Of equals the last: exact match is often 0 throughout.
    ranked = sorted(
        (row for row in rows if row["step"] > 0 and row["step"] in kept),
        key=lambda row: (selection_metric(row, best_by), -row["step"]),
    )
    best = next(row for row in ranked if row["step"] == here or sound(row["step"]))
    if best["step"] != here:
        state = loop.checkpoints.restore(state, best["step"])
    if math.isinf(selection_metric(best, best_by)) or nonfinite_leaves(state.params):
        raise TrainingError(
            "nothing was exported: no state that was evaluated has a finite "
            f"{best_by} and finite weights. The last checkpoint is "
            f"{max(kept)} in {loop.checkpoints.folder}; its figures are in "
            f"{EVALUATIONS}"
        )
    return state, best


_NAMED = {"kl_teacher", "student_perplexity", "teacher_perplexity", "tokens"}
"""Figures that a report has by other names, or once."""


def summary(
    evaluations: list[dict[str, Any]], after: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns KL, perplexities and what else was evaluated, before and after."""
    before = evaluations[0]
    others = {
        f"{key}_{when}": row[key]
        for key in HeldOut._fields
        if key not in _NAMED
        for when, row in (("before", before), ("after", after))
        if row.get(key) is not None
    }
    return {
        "teacher_perplexity": after["teacher_perplexity"],
        "student_perplexity_before": before["student_perplexity"],
        "student_perplexity_after": after["student_perplexity"],
        "kl_before": before["kl_teacher"],
        "kl_after": after["kl_teacher"],
        **others,
    }
