"""Tasks in several processes, each of which is made ready once."""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from taid_jax.data.errors import DataError

Ready = TypeVar("Ready")
Result = TypeVar("Result")


class _Process:
    """What this process was made ready with."""

    ready: Any


def run_all(
    task: Callable[..., Result],
    arguments: Sequence[tuple],
    *,
    workers: int,
    make_ready: Callable[..., Ready],
    ready_arguments: tuple,
) -> Iterator[Result]:
    """Yields the results of `task(make_ready(*ready_arguments), *arguments[i])`.

    In the order in which they are done. Processes are started anew, not forked: JAX and
    the tokenizers have threads.

    Args:
        task: A function of a module.
        arguments: Of every task.
        workers: Processes; with one, or one task, it is this one.
        make_ready: Called once in every process.
        ready_arguments: Its arguments.

    Raises:
        DataError: As soon as a task raises it; what was not begun is not done.
    """
    workers = min(workers, len(arguments))
    if workers <= 1:
        ready = make_ready(*ready_arguments) if arguments else None
        for each in arguments:
            yield task(ready, *each)
        return
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(make_ready, ready_arguments),
    ) as pool:
        running = [pool.submit(_run, task, each) for each in arguments]
        try:
            for future in concurrent.futures.as_completed(running):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start(make_ready: Callable[..., Ready], arguments: tuple) -> None:
    # Each process keeps to its core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Process.ready = make_ready(*arguments)


def _end_with_parent() -> None:
    # The pool's queues keep a process waiting whose parent was killed.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _run(task: Callable[..., Result], arguments: tuple) -> Result:
    try:
        return task(_Process.ready, *arguments)
    except DataError as error:
        # Plain, because not every subclass can be sent to another process.
        raise DataError(str(error)) from None
