"""Set-up of the parity tests: the project's recordings, PyTorch kept quiet."""

import importlib.util
import pathlib

import pytest


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    from parity.recordings import GOLDEN

    return GOLDEN


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    if importlib.util.find_spec("torch") is not None:
        import torch
        import transformers

        # The arrays are small: more threads than one wait for each other.
        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
