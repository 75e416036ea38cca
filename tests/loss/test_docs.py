"""The examples in the docstrings of the loss and of the schedule run."""

import doctest
import importlib
import inspect
import pkgutil

import pytest


def _modules() -> list[str]:
    import taid_jax.loss

    names = [module.name for module in pkgutil.iter_modules(taid_jax.loss.__path__)]
    return ["taid_jax.types", "taid_jax.schedule"] + [
        f"taid_jax.loss.{name}" for name in names
    ]


def test_every_example_runs():
    tried = 0
    for name in _modules():
        module = importlib.import_module(name)
        failed, count = doctest.testmod(
            module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        )
        assert not failed, name
        tried += count
    assert tried > 60


@pytest.mark.parametrize("package", ["taid_jax.loss", "taid_jax.schedule"])
def test_every_public_name_has_an_example(package):
    module = importlib.import_module(package)
    public = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == package and not name.startswith("_")
    ]
    assert public
    for name in public:
        assert ">>>" in (inspect.getdoc(getattr(module, name)) or ""), name
