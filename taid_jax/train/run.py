"""A whole run: from settings to a trained student, its report and its picture."""

import dataclasses
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from taid_jax.data import Dataset, held_out_batches, load_dataset, train_iterator
from taid_jax.evaluate import Comparison, HeldOut, evaluate
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import (
    abstract_params,
    decoder_functions,
    param_axes,
    select_layers,
)
from taid_jax.models.generate import generate
from taid_jax.models.load import (
    LoadedModel,
    export_model,
    load_config,
    load_model,
    random_init,
)
from taid_jax.models.tokenizer import load_tokenizer, same_tokenizer
from taid_jax.settings import (
    ModelSettings,
    Settings,
    SettingsError,
    contradictions,
    to_dict,
    to_json,
)
from taid_jax.sharding import (
    check_batch,
    make_mesh,
    replicated,
    tree_shardings,
)
from taid_jax.train.checkpoint import Checkpoints
from taid_jax.train.loop import Loop
from taid_jax.train.objective import make_objective, make_scheduler
from taid_jax.train.progress import ConsoleProgress
from taid_jax.train.report import (
    CURVES,
    EVALUATIONS,
    METRICS,
    REPORT,
    draw_curves,
    read_lines,
    write_json,
)
from taid_jax.train.state import (
    DistillState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    state_shardings,
)
from taid_jax.train.step import make_eval_step, make_train_step
from taid_jax.types import Params

SAMPLES = 3
SAMPLE_PROMPT = 24
SAMPLE_TOKENS = 40


@dataclasses.dataclass(frozen=True)
class Pair:
    """A teacher and the student that it teaches.

    Attributes:
        teacher: In the compute dtype.
        student_config: The student's architecture.
        student_params: Its float32 master weights.
        shardings: Where the student's weights live.
    """

    teacher: LoadedModel
    student_config: DecoderConfig
    student_params: Params
    shardings: Any


def distil(settings: Settings, console: Console) -> dict[str, Any]:
    """Runs a whole distillation and returns its report.

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
        TrainingError: If training stopped because of non-finite steps.
        Interrupted: If a signal stopped it; the state is saved.
    """
    began = time.perf_counter()
    mesh = make_mesh(settings.run.mesh)
    check_batch(settings.data.batch_size // settings.optimizer.grad_accum, mesh)
    folder = prepare_output(settings)
    tokenizer = check_models(settings.model, settings.data.seq_len)
    dataset = read_data(settings, tokenizer)
    checkpoints = Checkpoints(folder / "checkpoints", keep=settings.run.keep)
    if settings.run.resume:
        refuse_contradictions(checkpoints.settings(), settings)
    pair = load_pair(settings, mesh)
    describe(pair, dataset, mesh, console)
    (folder / "settings.json").write_text(to_json(settings) + "\n", encoding="utf-8")

    loop, state = assemble(settings, folder, pair, dataset, checkpoints, mesh)
    with ConsoleProgress(console, settings.run.steps, int(state.step)) as progress:
        loop.progress = progress
        state = loop.run(state)
    state, found = best_state(loop, state)
    checkpoints.close()

    export_model(
        folder / "student",
        pair.student_config,
        state.params,
        tokenizer,
        generation=pair.teacher.generation,
        replace=settings.run.resume,
    )
    evaluations = read_lines(folder / EVALUATIONS)
    report = {
        **summary(evaluations, found),
        "seconds": round(time.perf_counter() - began, 1),
        "tokens_per_second": median_rate(read_lines(folder / METRICS)),
        "held_out_tokens": evaluations[0]["tokens"],
        "settings": to_dict(settings),
    }
    write_json(folder / REPORT, report)
    draw_curves(
        folder / CURVES,
        read_lines(folder / METRICS),
        evaluations,
        title=f"{settings.objective.objective}: {settings.model.teacher} -> "
        f"{pair.student_config.num_layers} layers",
    )
    show_samples(settings, pair, state.params, dataset, console)
    return report


def prepare_output(settings: Settings) -> pathlib.Path:
    """Returns the output folder, made and writable; never one with something in it.

    Raises:
        SettingsError: If it cannot be written, holds something and `resume` is not set,
            or holds nothing and `resume` is set.
    """
    folder = pathlib.Path(settings.run.output).absolute()
    filled = folder.is_dir() and any(folder.iterdir())
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"output: {folder} is not a folder")
    if filled and not settings.run.resume:
        raise SettingsError(
            f"output: {folder} is not empty. Go on with what is there by --resume, or "
            "choose another --output; nothing was changed"
        )
    if settings.run.resume and not (folder / "checkpoints").is_dir():
        raise SettingsError(
            f"resume: {folder} has no checkpoints to go on from; leave --resume out to "
            "start anew"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"output: cannot make {folder}: {error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingsError(f"output: {folder} is not writable")
    return folder


def check_models(settings: ModelSettings, seq_len: int) -> Any:
    """Returns the tokenizer after reading configs and tokenizers, before any weights.

    Raises:
        ModelError: If a model cannot be used, or the tokenizers differ.
        SettingsError: If the sequences are longer than a model's context.
    """
    teacher = load_config(settings.teacher)
    tokenizer = load_tokenizer(settings.teacher)
    configs = {"teacher": teacher}
    if settings.student is not None:
        configs["student"] = load_config(settings.student)
        same_tokenizer(tokenizer, load_tokenizer(settings.student))
    elif settings.student_config is not None:
        configs["student"] = load_config(settings.student_config)
    else:
        layers = settings.layers_of_teacher
        if layers is not None and layers > teacher.num_layers:
            raise SettingsError(
                f"student_layers: the teacher has {teacher.num_layers} layers, "
                f"got {layers}"
            )
    for name, config in configs.items():
        if seq_len > config.max_length:
            raise SettingsError(
                f"seq_len: {seq_len} is beyond the {name}'s context of "
                f"{config.max_length} tokens"
            )
        if config.vocab_size < len(tokenizer):
            raise SettingsError(
                f"the {name} has {config.vocab_size} embeddings for the tokenizer's "
                f"{len(tokenizer)} entries"
            )
    return tokenizer


def read_data(settings: Settings, tokenizer: Any) -> Dataset:
    """Returns the training and held-out examples that the settings ask for."""
    data = settings.data
    return load_dataset(
        data.data,
        tokenizer,
        seq_len=data.seq_len,
        held_out_fraction=data.held_out_fraction,
        count_prompts=data.count_prompts,
        pack=data.pack,
    )


def refuse_contradictions(saved: Settings, asked: Settings) -> None:
    """Raises when a resumed run would compute something else than was begun.

    Raises:
        SettingsError: With a line per difference.
    """
    found = contradictions(saved, asked)
    if found:
        raise SettingsError(
            "the settings contradict the checkpoint:\n  "
            + "\n  ".join(found)
            + "\nuse the checkpoint's, or start anew with another --output"
        )


def load_pair(settings: Settings, mesh: Mesh) -> Pair:
    """Returns teacher and student on their devices."""
    model = settings.model

    def shardings(config: DecoderConfig) -> Any:
        return tree_shardings(param_axes(config), abstract_params(config), mesh)

    teacher = load_model(model.teacher, dtype=model.dtype, shardings=shardings)
    if model.layers_of_teacher is not None:
        params, config = select_layers(
            teacher.params, teacher.config, model.layers_of_teacher
        )
    elif model.student is not None:
        student = load_model(model.student, dtype="float32", shardings=shardings)
        params, config = student.params, student.config
    else:
        student = random_init(
            model.student_config, jax.random.key(settings.run.seed), shardings=shardings
        )
        params, config = student.params, student.config
    where = shardings(config)
    # A copy: the train step donates the student's arrays, and the teacher keeps its.
    own = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), tree),
        out_shardings=where,
    )
    return Pair(teacher, config, own(params), where)


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
        f"devices: {mesh.size} x {jax.devices()[0].device_kind} ({axes})",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def assemble(
    settings: Settings,
    folder: pathlib.Path,
    pair: Pair,
    dataset: Dataset,
    checkpoints: Checkpoints,
    mesh: Mesh,
) -> tuple[Loop, DistillState]:
    """Returns the loop and the state that it starts from, new or restored."""
    data, run, opt = settings.data, settings.run, settings.optimizer
    dtype = jnp.dtype(settings.model.dtype)
    student = decoder_functions(
        pair.student_config, dtype=dtype, remat=settings.model.remat
    )
    teacher = decoder_functions(pair.teacher.config, dtype=dtype)
    rate = learning_rate_schedule(opt.learning_rate, run.steps, opt.warmup_steps)
    optimizer = make_optimizer(
        rate,
        b1=opt.b1,
        b2=opt.b2,
        eps=opt.eps,
        weight_decay=opt.weight_decay,
        clip_norm=opt.clip_norm,
    )
    scheduler = make_scheduler(settings.objective, run.steps)
    objective, learned = make_objective(settings.objective)

    def start(params: Params) -> DistillState:
        return init_state(
            params,
            optimizer=optimizer,
            schedule=scheduler.init(),
            learned=learned,
            seed=run.seed,
        )

    shapes = jax.eval_shape(start, pair.student_params)
    shardings = state_shardings(shapes, pair.shardings, optimizer, replicated(mesh))
    batches = train_iterator(
        dataset.train,
        data.batch_size,
        seed=run.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if run.resume:
        template = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=where
            ),
            shapes,
            shardings,
        )
        restored = checkpoints.restore(template)
        state = restored.state
        if restored.data_state["fingerprint"] != dataset.info.fingerprint:
            raise SettingsError(
                f"the data of {data.data} are not those that checkpoint "
                f"{restored.step} was trained on; give the same files, or start anew "
                "with another --output"
            )
        batches.set_state(restored.data_state["iterator"])
    else:
        begin = jax.jit(start, out_shardings=shardings, donate_argnums=0)
        state = begin(pair.student_params)

    common = {
        "chunk_size": run.chunk_size,
        "mesh": mesh,
        "logits_loss": run.logits_loss,
    }
    train_step = make_train_step(
        student,
        teacher,
        make_objective=objective,
        scheduler=scheduler,
        optimizer=optimizer,
        learning_rate=rate,
        grad_accum=opt.grad_accum,
        shardings=shardings,
        **common,
    )
    eval_step = make_eval_step(student, teacher, Comparison(), **common)
    held_out = held_out_batches(
        dataset.held_out,
        data.batch_size,
        limit=data.held_out_batches,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    def judge(params: Params) -> HeldOut:
        return evaluate(eval_step, params, pair.teacher.params, held_out, mesh)

    loop = Loop(
        settings=settings,
        folder=folder,
        train_step=train_step,
        teacher_params=pair.teacher.params,
        batches=batches,
        fingerprint=dataset.info.fingerprint,
        evaluate=judge,
        checkpoints=checkpoints,
        mesh=mesh,
        progress=ConsoleProgress(Console(quiet=True), run.steps),
    )
    return loop, state


def best_state(loop: Loop, state: DistillState) -> tuple[DistillState, HeldOut]:
    """Returns the state with the lowest held-out KL, and what was found of it."""
    rows = read_lines(loop.folder / EVALUATIONS)
    best = min((row for row in rows if row["step"] > 0), key=lambda row: row["kl"])
    if best["step"] != int(state.step):
        state = loop.checkpoints.restore(state, best["step"]).state
    return state, HeldOut(**{key: best[key] for key in HeldOut._fields})


def summary(evaluations: list[dict[str, Any]], found: HeldOut) -> dict[str, Any]:
    """Returns KL and perplexities before and after."""
    before = evaluations[0]
    return {
        "teacher_perplexity": found.teacher_perplexity,
        "student_perplexity_before": before["student_perplexity"],
        "student_perplexity_after": found.student_perplexity,
        "kl_before": before["kl"],
        "kl_after": found.kl,
    }


def median_rate(rows: list[dict[str, Any]]) -> float | None:
    """Returns the median of the logged tokens per second."""
    rates = [row["tokens_per_second"] for row in rows]
    return round(float(np.median(rates)), 1) if rates else None


def _padded_left(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts with their padding moved from the right to the left."""
    shifts = ids.shape[1] - mask.sum(axis=1)
    rows = [
        (np.roll(row, shift), np.roll(real, shift))
        for row, real, shift in zip(ids, mask, shifts, strict=True)
    ]
    return np.stack([row for row, _ in rows]), np.stack([real for _, real in rows])


def show_samples(
    settings: Settings,
    pair: Pair,
    params: Params,
    dataset: Dataset,
    console: Console,
) -> None:
    """Prints how teacher and student go on with a few held-out beginnings."""
    tokenizer = pair.teacher.tokenizer
    rows = held_out_batches(dataset.held_out, 1)
    chosen = rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]
    length = min(SAMPLE_PROMPT, settings.data.seq_len)
    prompts = np.concatenate([row["input_ids"][:, :length] for row in chosen])
    # Only the first of the examples that share a row; the pad of a short one counts not.
    first = [row.get("segment_ids", row.get("attention_mask")) for row in chosen]
    mask = np.concatenate([row[:, :length] == 1 for row in first]).astype(np.int32)
    prompts, mask = _padded_left(prompts, mask)
    sides = {
        "teacher": (pair.teacher.params, pair.teacher.config),
        "student": (params, pair.student_config),
    }
    answers = {
        name: np.asarray(
            generate(
                weights,
                config,
                jnp.asarray(prompts),
                jnp.asarray(mask),
                max_new_tokens=SAMPLE_TOKENS,
                eos_token_ids=(),
                pad_token_id=0,
                dtype=jnp.dtype(settings.model.dtype),
            )
        )
        for name, (weights, config) in sides.items()
    }
    for index, prompt in enumerate(prompts):
        console.rule(f"sample {index + 1}")
        text = tokenizer.decode(prompt[mask[index] == 1])
        console.print(text, markup=False, highlight=False)
        for name, tokens in answers.items():
            console.print(f"[bold]{name}:[/bold]", end=" ")
            console.print(
                tokenizer.decode(tokens[index]), markup=False, highlight=False
            )
