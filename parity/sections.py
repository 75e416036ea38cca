"""The subcommands: which rows each makes, from what the command line chose."""

from argparse import Namespace
from collections.abc import Callable

from parity.rows import AnyRow


def losses(options: Namespace) -> list[AnyRow]:
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
        made += recorded.reference_rows(options.golden, options.upstream)
        made += rows.random_rows(seeds, published=options.upstream)
    return made


def schedule(options: Namespace) -> list[AnyRow]:
    """Returns the rows of TAID's schedule."""
    from parity import schedule as rows

    seeds = range(options.seeds)
    made: list[AnyRow] = [
        *rows.recorded_rows(options.golden),
        *rows.random_rows(seeds),
    ]
    if options.upstream is not None:
        made += rows.random_rows(seeds, published=options.upstream)
    return made


def models(options: Namespace) -> list[AnyRow]:
    """Returns the rows of the decoder."""
    from parity import models as rows

    if options.fetch:
        from taid_jax.models.files.hub import SMOLLM2, fetch

        fetch(SMOLLM2)
    return [*rows.random_rows(range(options.seeds)), *rows.smollm2_rows()]


def run(options: Namespace) -> list[AnyRow]:
    """Returns the rows of whole training runs."""
    from parity import run as rows

    made: list[AnyRow] = [
        *rows.recorded_rows(options.golden),
        *rows.fresh_rows(range(options.seeds)),
    ]
    if options.upstream is not None:
        made += rows.again_rows(options.golden, options.upstream)
    return made


def deviations(options: Namespace) -> list[AnyRow]:
    """Returns the rows of what is not followed."""
    from parity.deviations import deviation_rows

    made: list[AnyRow] = [*deviation_rows()]
    if options.upstream is not None:
        made += deviation_rows(options.upstream)
    return made


def student(options: Namespace) -> list[AnyRow]:
    """Returns the rows of a finished run's exported student."""
    from parity.student import student_rows

    return student_rows(options.run_folder)


SECTIONS: dict[str, Callable[[Namespace], list[AnyRow]]] = {
    "losses": losses,
    "schedule": schedule,
    "models": models,
    "run": run,
    "deviations": deviations,
    "student": student,
}
