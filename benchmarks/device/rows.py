"""What a process of `check_device.py` tells the one that started it."""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from taid_jax.errors import explain

MARK = "@row "
"""Starts a line for the parent; all others are for its log."""

Figures = dict[str, Any]
Row = tuple[str, Callable[[], Figures]]
"""Name of a row, and what computes it."""


class Options(NamedTuple):
    """What a section has to know.

    Attributes:
        small: Shapes for two cores of a CPU.
        platform: "gpu", "tpu" or "cpu"; empty for what JAX finds.
        minutes: Of section E.
        models: Folder or file of SmolLM2; empty to look into the cache.
    """

    small: bool
    platform: str
    minutes: float
    models: str


class MissingError(Exception):
    """What a row needs is not on this machine."""


def tell(**figures: Any) -> None:
    """Hands figures on; numbers that JSON has not, by their names."""
    plain = {
        name: str(value)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in figures.items()
    }
    print(MARK + json.dumps(plain), flush=True)


def run_rows(rows: Sequence[Row]) -> None:
    """Computes rows one after the other, and tells each when it is done.

    A row with a `limit` passes if its `error` is not above it, and fails otherwise. One
    that raises, for want of memory say, is told with the reason, and the next begins.
    """
    tell(planned=[name for name, _ in rows])
    for name, compute in rows:
        began = time.perf_counter()
        try:
            figures = compute()
        except (MissingError, ModuleNotFoundError) as missing:
            tell(row=name, status="skipped", note=str(missing))
            continue
        except Exception as error:
            note = f"{type(error).__name__}: {explain(error)}"
            tell(row=name, status="error", note=note)
            continue
        status = "measured"
        if "limit" in figures:
            # NaN is not below anything.
            status = "pass" if figures["error"] <= figures["limit"] else "fail"
        seconds = round(time.perf_counter() - began, 1)
        tell(row=name, status=status, **figures, row_seconds=seconds)


def median_ms(run: Callable[[], object], rounds: int) -> float:
    """Returns the median milliseconds of a call that waits for its result.

    The first call is not counted: it may compile.
    """
    run()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def torch_device(options: Options) -> str:
    """Returns where PyTorch computes what JAX is compared with.

    Raises:
        MissingError: If it cannot compute there.
    """
    import torch

    if options.platform == "tpu":
        raise MissingError("PyTorch does not run on this TPU")
    if options.platform == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise MissingError("this PyTorch sees no GPU")
    return "cuda"


def torch_peak_gib(device: str) -> float | None:
    """Returns the most memory that PyTorch had on a GPU since it was last asked."""
    import torch

    if device == "cpu":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak
