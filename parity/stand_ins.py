"""Stand-ins for what a checkout of the published code imports and asks of a machine."""

import contextlib
import importlib.abc
import importlib.machinery
import pathlib
import sys
import types
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode

_FRAMEWORKS = (
    "accelerate",
    "datasets",
    "deepspeed",
    "evaluate",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "peft",
    "pytorch_lightning",
    "rouge_score",
    "torchmetrics",
    "transformers",
    "wandb",
)


class _StandIn(type):
    """A class whose every attribute is again such a class, and that takes anything."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(name)

    def __getitem__(cls, item: object) -> type:
        return cls


def _ignore(self: object, *args: object, **kwargs: object) -> None:
    del self, args, kwargs


def _stand_in(name: str) -> type:
    return _StandIn(name, (), {"__init__": _ignore})


class _StandInModule(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(name)


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in _FRAMEWORKS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StandInModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        del module


def _framework_modules() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in _FRAMEWORKS]


@contextlib.contextmanager
def stood_in(folder: pathlib.Path) -> Iterator[None]:
    """Imports from a checkout, with stand-ins in place of the frameworks it names."""
    real = {name: sys.modules.pop(name) for name in _framework_modules()}
    finder, path = _StandInFinder(), list(sys.path)
    sys.meta_path.insert(0, finder)
    sys.path[:0] = [str(folder), str(folder / "src")]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.path[:] = path
        for name in _framework_modules():
            del sys.modules[name]
        sys.modules.update(real)


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Answers a request for a CUDA device with the CPU, where there is none."""
    if torch.cuda.is_available():
        yield
    else:
        with _CudaIsCpu():
            yield
