"""Shared set-up: eight fake devices, strict dtypes and shapes, checked annotations."""

import os
import pathlib
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jaxlib.version
import jaxtyping
import pytest

_ONE_EMITTER_ONLY = (0, 11)
"""The first jaxlib without the older of XLA's two emitters for CPUs."""
if jaxlib.version.__version_info__ < _ONE_EMITTER_ONLY:
    # The older one compiles in a quarter of the time. Users' programs come from the
    # newer one: `XLA_FLAGS= pytest -m optimised tests/loss` holds the losses to it.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )

_checked = jaxtyping.jaxtyped


def _checked_once(**options):
    """Leaves out functions in functions: each call of the outer one wraps them anew.

    That took a fifth of the suite's time.
    """
    check = _checked(**options)
    return lambda item: item if "<locals>" in item.__qualname__ else check(item)


jaxtyping.jaxtyped = _checked_once
# The hook has to come before the first import of the package.
jaxtyping.install_import_hook("taid_jax", "beartype.beartype")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiled programs are kept between runs: most of the suite's time is compilation.
_cache = pathlib.Path(
    os.environ.get(
        "TAID_JAX_TEST_CACHE", tempfile.gettempdir() + "/taid-jax-tests-compiled"
    )
)
# A folder for each process of a parallel run: the cache is not locked.
_cache /= os.environ.get("PYTEST_XDIST_WORKER", "")
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
# Commands that tests start as processes of their own.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update("jax_disable_most_optimizations", True)
_optimised = False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles without most of XLA's optimisation, but for tests marked `optimised`.

    Most of the suite's time is compilation, and values of small shapes need none of it.
    Marked are those that hold numbers to float32's last digits, as users' programs have
    them, and those that look at a compiled program or its memory.
    """
    global _optimised
    wanted = item.get_closest_marker("optimised") is not None
    if wanted != _optimised:
        _optimised = wanted
        jax.config.update("jax_disable_most_optimizations", not wanted)
        jax.clear_caches()  # The switch is no part of a program's key.
