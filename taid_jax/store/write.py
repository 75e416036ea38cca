"""The job that stores a teacher's outputs: a file after the other, each once."""

import contextlib
import dataclasses
import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int, Shaped
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save

from taid_jax import distributed
from taid_jax.data import Dataset
from taid_jax.errors import ModelError, show
from taid_jax.files import write_whole
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params, decoder_functions, param_axes
from taid_jax.models.files.load import LoadedModel
from taid_jax.models.files.tokenizer import digest_tokenizer, require_tokenizer
from taid_jax.models.files.vocabulary import with_tokenizer
from taid_jax.models.memory import check_fits, params_need
from taid_jax.settings import Settings, SettingsError
from taid_jax.sharding import (
    TEACHER_RULES,
    activations_on,
    batch_part,
    check_batch,
    make_mesh,
    place_batch,
    tree_shardings,
)
from taid_jax.store.folder import (
    DONE,
    Sink,
    announce,
    begin_store,
    finish_store,
    made_before,
    tidy,
    writing,
)
from taid_jax.store.format import (
    HEAD,
    Column,
    File,
    Kind,
    Manifest,
    example_key,
    read_manifest,
)
from taid_jax.store.lots import JobFiles, Lot, find_owned, make_lots, plan_shards
from taid_jax.store.options import StoreOptions
from taid_jax.store.outputs import (
    DRAWS,
    Outputs,
    draws_of,
    hidden_outputs,
    is_finite,
    sampled_outputs,
    topk_outputs,
)
from taid_jax.store.teacher import head_params, write_teacher_folder
from taid_jax.train.inputs import OpenPair, check_memory, check_models, read_data
from taid_jax.train.resume import digest_weights
from taid_jax.types import Batch, Params

_SPARE = 2**20
"""Bytes beside records and head: manifest, index, tokenizer."""


def store_teacher(
    settings: Settings, options: StoreOptions, console: Console
) -> Manifest:
    """Runs a teacher over a data set and stores what it gives for each token.

    Rows and batches are those of a training run with the same data settings, and of the
    size of its micro-batches, so that the outputs are the same to the last bit. Of
    several processes each calls this; each writes the records of its own rows. The
    store is `run.output` of the settings.

    Raises:
        SettingsError: If settings contradict each other, or the output is something
            else's.
        ModelError: If a model cannot be used.
        DataError: If the data cannot be used.
        StoreError: If it does not fit on the disk.
    """
    with jax.default_matmul_precision(settings.model.matmul_precision):
        return _store_teacher(settings, options, console)


def _store_teacher(
    settings: Settings, options: StoreOptions, console: Console
) -> Manifest:
    distributed.agree_on_settings(settings)
    mesh = make_mesh(settings.run.mesh)
    size = settings.data.batch_size // settings.optimizer.grad_accum
    check_batch(size, mesh)
    check_memory(settings, mesh)
    model = settings.model
    if model.student is None and model.student_config is None:
        # It has the teacher's tokenizer, and that is all that matters of it here.
        model = dataclasses.replace(model, student_layers=1)
    opened = check_models(model, settings.data.seq_len)
    settings = _with_date(settings)
    dataset = read_data(settings, opened.tokenizer)
    distributed.agree("data", dataclasses.asdict(dataset.info))
    recipe = _recipe(settings, options, opened)
    sides = dataset.train, dataset.held_out
    lots = [lot for side in sides for lot in make_lots(side, size)]
    files = JobFiles(
        pathlib.Path(settings.run.output).absolute(),
        plan_shards(lots, recipe.columns, options),
        batch_part(mesh)[1],
        find_owned(lots),
    )
    facts = distributed.broadcast(
        lambda: _facts(settings, options, opened, dataset, recipe, mesh)
    )
    distributed.broadcast(lambda: _announce(files, recipe, facts, console))
    with contextlib.ExitStack() as hold:
        if distributed.broadcast(lambda: begin_store(files.folder, facts, hold)):
            tidy(files.folder)
            return read_manifest(files.folder)
        for note in opened.teacher.notes:
            console.print(
                f"note: {note}", soft_wrap=True, highlight=False, markup=False
            )
        teacher = _load(settings, opened, mesh)
        _write_teacher(files.folder, teacher, recipe)
        _write_shards(files, recipe, teacher, mesh, console)
        distributed.broadcast(lambda: _finish(files, facts))
        if distributed.is_main_process():
            tidy(files.folder)
        return read_manifest(files.folder)


def _with_date(settings: Settings) -> Settings:
    """Returns settings with the day that the job began, which it goes on with."""

    def find() -> str:
        before = made_before(pathlib.Path(settings.run.output).absolute())
        today = datetime.date.today().isoformat()
        return settings.data.template_date or before.get("template_date") or today

    data = dataclasses.replace(settings.data, template_date=distributed.broadcast(find))
    return dataclasses.replace(settings, data=data)


class _Recipe(NamedTuple):
    """What is computed of every lot."""

    kind: Kind
    columns: tuple[Column, ...]
    outputs: Outputs
    config: DecoderConfig


def _recipe(settings: Settings, options: StoreOptions, opened: OpenPair) -> _Recipe:
    tokenizer = require_tokenizer(opened.teacher.tokenizer, opened.teacher.source)
    config = with_tokenizer(opened.teacher.config, tokenizer)
    dtype = settings.model.dtype
    teacher = decoder_functions(config, dtype=dtype)
    if options.kind == "hidden":
        own = options.store_dtype
        stored = dtype if own == "same" else own
        made = hidden_outputs(teacher, config.d_model, stored)
        return _Recipe("hidden", *made, config)
    if options.sampled:
        made = sampled_outputs(teacher, config.vocab_size, options.sampled)
        return _Recipe("sampled", *made, config)
    if options.k > config.vocab_size:
        raise SettingsError(
            f"k: need at most {config.vocab_size}, the entries of the teacher's "
            f"vocabulary, got {options.k}"
        )
    made = topk_outputs(teacher, config.vocab_size, options.k)
    return _Recipe("topk", *made, config)


def _facts(
    settings: Settings,
    options: StoreOptions,
    opened: OpenPair,
    dataset: Dataset,
    recipe: _Recipe,
    mesh: Mesh,
) -> dict[str, Any]:
    """Returns what decides what is stored, as JSON has it: a job goes on with it."""
    data, teacher = settings.data, opened.teacher
    precision = settings.model.matmul_precision
    tokenizer = require_tokenizer(teacher.tokenizer, teacher.source)
    return {
        "kind": recipe.kind,
        "columns": [dataclasses.asdict(column) for column in recipe.columns],
        "vocab_size": recipe.config.vocab_size,
        "teacher": digest_weights(teacher.source.path),
        "tokenizer": digest_tokenizer(tokenizer),
        "source": teacher.source.name,
        "draws": options.sampled,
        "made": {
            "data": data.data,
            "fingerprint": dataset.info.fingerprint,
            "seq_len": data.seq_len,
            "template_date": data.template_date,
            "rows": settings.data.batch_size // settings.optimizer.grad_accum,
            "dtype": settings.model.dtype,
            "part": options.part,
            "shard_mib": options.shard_mib,
            "processes": batch_part(mesh)[1],
            # Jobs begun before there was a choice go on.
            **({} if precision == "default" else {"matmul_precision": precision}),
        },
    }


def _announce(
    files: JobFiles, recipe: _Recipe, facts: Mapping[str, Any], console: Console
) -> None:
    beside = _SPARE
    if recipe.kind == "hidden":
        head = head_params(abstract_params(recipe.config), recipe.config)
        beside += sum(4 * leaf.size for leaf in jax.tree.leaves(head))
    numbers = [
        number
        for shard in files.shards
        for lot in shard.lots
        for part in range(files.parts)
        for _, _, number in files.examples(lot, part)
    ]
    table = files.shards[0].lots[0].side.table if files.shards else None
    tokens = 0 if table is None else int(table.lengths[numbers].sum())
    examples = len(numbers)
    announce(
        files.folder,
        facts,
        console,
        examples=examples,
        tokens=tokens,
        files=len(files.shards),
        beside=beside,
    )


def _write_shards(
    files: JobFiles,
    recipe: _Recipe,
    teacher: LoadedModel,
    mesh: Mesh,
    console: Console,
) -> None:
    """Writes what is not done of the files, those of this process."""
    part, _ = batch_part(mesh)
    writes = _writes(part)

    def left() -> list[int]:
        return [
            shard.number
            for shard in files.shards
            if not all(files.done(files.path(shard, p)) for p in range(files.parts))
        ]

    todo = set(distributed.broadcast(left))

    @jax.jit
    def run(params: Params, batch: Batch) -> tuple[jax.Array, ...]:
        with activations_on(mesh):
            return recipe.outputs(params, batch)

    def inputs(lot: Lot) -> dict[str, jax.Array]:
        rows = files.rows(lot, part)
        batch: dict[str, Any] = lot.side.batch(rows, len(rows), lot.length)
        del batch["labels"]
        if recipe.kind == "sampled":
            batch[DRAWS] = np.zeros((len(rows), lot.length), np.float32)
            for row, start, number in files.examples(lot, part):
                ids = lot.side.table[number].ids
                batch[DRAWS][row, start : start + len(ids)] = draws_of(ids)
        return place_batch(batch, mesh)

    shards = [shard for shard in files.shards if shard.number in todo]
    with Progress(console=console, disable=not writes) as progress:
        bar = progress.add_task(
            "storing", total=sum(len(shard.lots) for shard in shards)
        )
        for shard in shards:
            path = files.path(shard, part)
            sink = Sink(path, recipe.kind) if writes else None
            with sink or contextlib.nullcontext():
                ahead = run(teacher.params, inputs(shard.lots[0]))
                for place, lot in enumerate(shard.lots):
                    here, more = ahead, shard.lots[place + 1 : place + 2]
                    if more:  # The devices work while the host writes.
                        ahead = run(teacher.params, inputs(more[0]))
                    if sink:
                        arrays = [_local(array) for array in here]
                        for row, start, number in files.examples(lot, part):
                            ids = lot.side.table[number].ids
                            token = slice(start, start + len(ids))
                            values = [array[row, token] for array in arrays]
                            _check_finite(recipe, ids, values)
                            sink.write(ids, values)
                    progress.advance(bar)


def _check_finite(
    recipe: _Recipe,
    ids: Int[np.ndarray, " tokens"],
    values: Sequence[Shaped[np.ndarray, "tokens _"]],
) -> None:
    """Raises unless the outputs of an example are numbers.

    Raises:
        ModelError: With the tokens of which they are not.
    """
    names = (column.name for column in recipe.columns)
    if not is_finite(dict(zip(names, values, strict=True))):
        raise ModelError(
            f"the teacher: not finite on an example of {len(ids)} tokens, which begins "
            f"with {show(ids[:8].tolist())}. NaN or inf in the weights, or ones too "
            "large for --dtype, are the usual cause; give sound weights, or --dtype "
            "float32"
        )


def _writes(part: int) -> bool:
    """Returns whether this process is the first of those that have the same rows."""
    if jax.process_count() == 1:
        return True
    parts = np.asarray(multihost_utils.process_allgather(np.int32(part)))
    return int(np.flatnonzero(parts == part)[0]) == jax.process_index()


def _local(array: jax.Array) -> np.ndarray:
    """Returns the rows that this process holds, in order."""
    pieces = {
        shard.index[0].start or 0: shard.data for shard in array.addressable_shards
    }
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def _load(settings: Settings, opened: OpenPair, mesh: Mesh) -> LoadedModel:
    """Returns the teacher on its devices."""
    rules, dtype = TEACHER_RULES[settings.model.teacher_sharding], settings.model.dtype

    def shardings(config: DecoderConfig) -> Any:
        return tree_shardings(param_axes(config), abstract_params(config), mesh, rules)

    config = opened.teacher.config
    check_fits(params_need("the teacher", config, dtype, shardings(config)))
    return opened.teacher.load(dtype=dtype, shardings=shardings)


def _write_teacher(folder: pathlib.Path, teacher: LoadedModel, recipe: _Recipe) -> None:
    """Writes what training needs of a teacher beside its outputs."""
    head = {}
    if recipe.kind == "hidden":
        head = distributed.gather(head_params(teacher.params, recipe.config))
    if not distributed.is_main_process():
        return
    with writing(folder / HEAD):
        if recipe.kind == "hidden":
            leaves = jax.tree_util.tree_leaves_with_path(head)
            arrays = {
                jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
                for path, leaf in leaves
            }
            write_whole(folder / HEAD, save(arrays))
        write_teacher_folder(folder, teacher)


def _finish(files: JobFiles, facts: Mapping[str, Any]) -> None:
    """Writes index and manifest, and clears away what was for going on alone."""
    folder = files.folder
    found, entries, tokens, mass = [], [], 0, 0.0
    for shard in files.shards:
        for part in range(files.parts):
            path = files.path(shard, part)
            about = json.loads(path.with_name(path.name + DONE).read_bytes())
            numbers = [
                (lot.side.table[number].ids, start)
                for lot in shard.lots
                for _, start, number in files.examples(lot, part)
            ]
            entries += [
                (example_key(ids), len(found), record, start)
                for record, (ids, start) in enumerate(numbers)
            ]
            found.append(File(**about["file"]))
            tokens += sum(len(ids) for ids, _ in numbers)
            mass += about["mass"]
    finish_store(folder, facts, entries, found, tokens, mass)
