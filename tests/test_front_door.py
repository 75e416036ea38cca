"""Tests of what a user sees of the package before using any of it."""

import subprocess
import sys

import pytest

import taid_jax
import taid_jax.data
import taid_jax.models
import taid_jax.train


def modules_after(statement: str) -> set[str]:
    """Returns the modules that a fresh interpreter has imported after a statement."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(found.stdout.split())


def test_import_of_the_package_alone_imports_no_library():
    heavy = {"jax", "flax", "transformers", "orbax", "grain", "torch"}
    assert not heavy & modules_after("import taid_jax")


def test_loss_is_reached_without_importing_it():
    found = modules_after("import taid_jax; taid_jax.loss.TAID")
    assert "taid_jax.loss" in found
    assert not {"flax", "optax", "transformers", "orbax"} & found


@pytest.mark.parametrize("package", [taid_jax.data, taid_jax.models, taid_jax.train])
def test_packages_show_public_names_alone_and_each_is_there(package):
    assert dir(package) == package.__all__
    for name in dir(package):
        assert getattr(package, name) is not None


def test_dir_shows_public_names_alone_and_each_is_there():
    assert set(dir(taid_jax)) == {*taid_jax.__all__, "__version__"}
    for name in dir(taid_jax):
        assert getattr(taid_jax, name) is not None


def test_getattr_of_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'los'"):
        _ = taid_jax.los
