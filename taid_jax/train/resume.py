"""Going on with a run: from which checkpoint, and whether it is the same run."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping

from taid_jax.data import Dataset
from taid_jax.errors import InputError, parsing
from taid_jax.models.config import DecoderConfig
from taid_jax.settings import Settings, SettingsError, contradictions, from_dict
from taid_jax.train.checkpoint import (
    DIGESTS,
    UNVERIFIED,
    CheckpointError,
    SavedRun,
    compare_file,
    find_fault,
    read_json_file,
    read_run,
)
from taid_jax.train.folder import CHECKPOINTS, SETTINGS, RunFolder, step_folders
from taid_jax.train.pair import Pair


def look(output: RunFolder, settings: Settings) -> int | None:
    """Returns the checkpoint to go on from, None for a run that begins.

    Nothing is made. Where there are checkpoints the folder is held from here on.

    Raises:
        SettingsError: If there is no place for this run.
        CheckpointError: If no checkpoint is sound, or not the one that is asked for.
    """
    output.check()
    if not settings.run.resume:
        return None
    if output.has_checkpoints() or settings.run.resume_step is not None:
        if output.has_checkpoints():
            output.claim()
        return choose_checkpoint(output, settings.run.resume_step)
    output.notes.append(f"{output.path} has no checkpoint yet: the run starts anew")
    return None


def compare_runs(
    saved: SavedRun, settings: Settings, dataset: Dataset, step: int
) -> list[str]:
    """Returns lines about how long a resumed run is, where that has to be said.

    Raises:
        SettingsError: If it would compute something else than was begun, with a line
            per difference; if its data are others; or if it is shorter than what was
            done.
    """
    if found := contradictions(saved.settings, settings):
        raise SettingsError(
            "the settings contradict the checkpoint:\n  "
            + "\n  ".join(found)
            + "\nleave them out to use the checkpoint's, or start anew with another "
            "--output"
        )
    if saved.place.get("fingerprint") != dataset.info.fingerprint:
        raise SettingsError(
            f"the data of {settings.data.data} are not those that the checkpoint was "
            "trained on; give the same files, or start anew with another --output"
        )
    steps, before = settings.run.steps, saved.settings.run.steps
    if steps < step:
        raise SettingsError(
            f"steps: need at least {step}, the steps that checkpoint {step} has seen, "
            f"got {steps}; --resume-step N goes on from an earlier one"
        )
    if steps != before:
        return [
            f"the run has {steps} steps in place of {before}: from step {step} on "
            "learning rate, t and all that depends on the length follow the schedule "
            f"of {steps} steps"
        ]
    if steps == step:
        return [
            f"all {steps} steps are done: student and report are written once more; "
            "more --steps make the run longer"
        ]
    return []


def choose_checkpoint(folder: RunFolder, step: int | None) -> int | None:
    """Returns the checkpoint that a run goes on from; None where there is none.

    It is the newest sound one, or the one that is asked for. `set_aside_others` makes
    it the last.

    Args:
        folder: Of the run.
        step: Which one; the newest sound one when None.

    Raises:
        CheckpointError: If none is sound, or not the one that is asked for.
    """
    places = step_folders(folder.path / CHECKPOINTS)
    if step is not None:
        if step not in places:
            there = ", ".join(map(str, places)) or "none"
            raise CheckpointError(
                f"resume_step: {folder.path} has no checkpoint {step}; there are "
                f"{there}"
            )
        fault = find_fault(places[step])
        if fault == UNVERIFIED:
            folder.notes.append(f"checkpoint {step} {fault}; it is used as asked for")
        elif fault:
            raise CheckpointError(
                f"resume_step: {places[step]} {fault}; choose another checkpoint"
            )
        return step
    faults = []
    for number, place in places.items():
        fault = find_fault(place)
        if fault is None:
            return number
        faults.append(f"{place} {fault}")
    if faults:
        raise CheckpointError(
            "no checkpoint is sound:\n  "
            + "\n  ".join(faults)
            + f"\nMove {folder.path / CHECKPOINTS} away to start anew with --resume. "
            f"--resume-step N takes one without {DIGESTS} as it is"
        )
    return None


def set_aside_others(folder: RunFolder, step: int) -> None:
    """Makes a checkpoint the last, with only sound ones before it."""
    places = step_folders(folder.path / CHECKPOINTS)
    for number, place in places.items():
        if number > step:
            why = find_fault(place) or "is newer than the one that is asked for"
            folder.set_aside(place, why)
        elif number < step and (fault := find_fault(place)):
            folder.set_aside(place, fault)
    if max(places) > step:
        folder.notes.append(f"going on from checkpoint {step}")


def saved_settings(output: str | pathlib.Path) -> tuple[Settings | None, str | None]:
    """Returns the settings that a run began with, for those not given again.

    They are those of the newest checkpoint whose settings are as they were written;
    what may change on the way is taken from `settings.json`, which is the only source
    before the first checkpoint.

    Args:
        output: Folder of the run.

    Returns:
        The settings, None where there are none; and what is wrong with `settings.json`.
    """
    folder = pathlib.Path(output).absolute()
    path = folder / SETTINGS
    saved = written = note = None
    for place in step_folders(folder / CHECKPOINTS).values():
        with contextlib.suppress(InputError), parsing(str(place)):
            files = read_json_file(place / DIGESTS)["files"]
            if not compare_file(place / "run/metadata", files["run/metadata"]):
                saved = read_run(place).settings
                break
    if path.exists() or saved:
        try:
            with parsing(str(path)):
                written = from_dict(read_json_file(path))
        except InputError as error:
            named = "" if str(path) in str(error) else f"{path}: "
            note = f"{named}{error}"
    if saved is None or written is None:
        return written or saved, note
    if contradictions(saved, written):
        return saved, f"{path} has other settings than the last checkpoint"
    return written, None


_BLOCKS, _BLOCK = 64, 1 << 20


def identify_models(pair: Pair) -> dict[str, str]:
    """Returns what tells whether a resumed run has the models that it began with.

    It is the content, wherever the files lie.

    Returns:
        Settings of both, and what identifies the teacher's weights or its store; of
        several teachers all in their order.
    """
    if pair.stores:
        weights = [f"stored: {store.identity()}" for store in pair.stores]
    else:
        weights = [digest_weights(path) for path in pair.teacher_paths]
    # Of several teachers together: with one more or less all of them are others.
    known = [_fields(each.config) for each in pair.teachers]
    return {
        "the teacher's weights": " and ".join(weights),
        **{
            f"the teacher's {name}": " and ".join(each[name] for each in known)
            for name in known[0]
        },
        **{f"the student's {k}": v for k, v in _fields(pair.student_config).items()},
    }


def digest_weights(path: pathlib.Path) -> str:
    """Returns what identifies the weights of a model.

    Size, beginning and end of each file and 64 blocks of 1 MiB between are read:
    whoever trains on changes all.

    Args:
        path: A GGUF file, or a folder of safetensors files.
    """
    weights = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        weights.update(f"{file.name if path.is_dir() else ''}:{size}\n".encode())
        last = max(0, size - _BLOCK)
        with file.open("rb") as stream:
            for place in sorted({last * n // _BLOCKS for n in range(_BLOCKS + 1)}):
                stream.seek(place)
                weights.update(stream.read(_BLOCK))
    return weights.hexdigest()


def _fields(config: DecoderConfig) -> dict[str, str]:
    fields = dataclasses.fields(config)
    return {field.name: repr(getattr(config, field.name)) for field in fields}


def refuse_other_models(saved: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Raises when the models are not those that a run began with.

    What another version of this library did not write down is not compared.

    Raises:
        SettingsError: With what differs.
    """
    found = [name for name in saved if given.get(name, saved[name]) != saved[name]]
    if found:
        raise SettingsError(
            f"the models are not those that the run began with: {', '.join(found)} "
            "differ. Give the same ones, or start anew with another --output"
        )
