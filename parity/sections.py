"""The subcommands: which rows each makes, and from what."""

import dataclasses
import pathlib
from collections.abc import Callable

from parity.recordings import GOLDEN
from parity.rows import AnyRow
from parity.upstream import NAME, Upstream


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line chose.

    Attributes:
        seeds: Sets of random inputs; 0 leaves the recordings alone.
        golden: A folder of recordings.
        upstream: The published code, where the user has a checkout of it.
        fetch: Fetch the real model if it is not in the cache.
        run_folder: A finished run, whose student is scored.
    """

    seeds: int = 1
    golden: pathlib.Path = GOLDEN
    upstream: Upstream | None = None
    fetch: bool = False
    run_folder: pathlib.Path | None = None


def losses(options: Options) -> list[AnyRow]:
    """Returns the rows of values and gradients."""
    from parity import fused, pairs, recorded
    from parity import losses as rows

    seeds = range(options.seeds)
    made: list[AnyRow] = [
        *recorded.reference_rows(options.golden),
        *recorded.recorded_rows(options.golden),
        *recorded.temperature_rows(options.golden),
        *rows.random_rows(seeds),
        *fused.random_rows(seeds),
        *pairs.random_rows(seeds),
    ]
    if options.upstream is not None:
        theirs = options.upstream.loss
        made += recorded.reference_rows(options.golden, theirs, NAME)
        made += rows.random_rows(seeds, published=theirs, other=NAME)
    return made


def schedule(options: Options) -> list[AnyRow]:
    """Returns the rows of TAID's schedule."""
    from parity import schedule as rows

    seeds = range(options.seeds)
    made: list[AnyRow] = [
        *rows.recorded_rows(options.golden),
        *rows.random_rows(seeds),
    ]
    if options.upstream is not None:
        theirs = options.upstream.schedule
        made += rows.random_rows(seeds, make_published=theirs, other=NAME)
    return made


def models(options: Options) -> list[AnyRow]:
    """Returns the rows of the decoder."""
    from parity import models as rows

    if options.fetch:
        from taid_jax.models.files.hub import SMOLLM2, fetch

        fetch(SMOLLM2)
    return [*rows.random_rows(range(options.seeds)), *rows.smollm2_rows()]


def run(options: Options) -> list[AnyRow]:
    """Returns the rows of whole training runs."""
    from parity import run as rows

    made: list[AnyRow] = [
        *rows.recorded_rows(options.golden),
        *rows.fresh_rows(range(options.seeds)),
    ]
    if options.upstream is not None:
        theirs = options.upstream
        made += rows.again_rows(options.golden, NAME, theirs.loss, theirs.schedule)
    return made


def deviations(options: Options) -> list[AnyRow]:
    """Returns the rows of what is not followed."""
    from parity.deviations import deviation_rows
    from parity.published import Published

    made: list[AnyRow] = [*deviation_rows()]
    if options.upstream is not None:
        theirs = options.upstream
        made += deviation_rows(
            Published(NAME, theirs.loss, theirs.schedule, theirs.temperature_gradient)
        )
    return made


def student(options: Options) -> list[AnyRow]:
    """Returns the rows of a finished run's exported student."""
    from parity.student import student_rows

    return student_rows(options.run_folder)


SECTIONS: dict[str, Callable[[Options], list[AnyRow]]] = {
    "losses": losses,
    "schedule": schedule,
    "models": models,
    "run": run,
    "deviations": deviations,
    "student": student,
}
