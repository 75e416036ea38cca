"""The console command as a whole; what each command does is tested beside this."""

import importlib
import pathlib
import subprocess
import sys
import tomllib

import pytest

from taid_jax import __version__, cli

ROOT = pathlib.Path(__file__).parents[2]

HELP = """
import sys
from taid_jax.cli import main
try:
    main([sys.argv[1], "--help"])
except SystemExit as end:
    print("status", end.code)
print("modules", *sys.modules)
"""


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """The handler of Ctrl-C is that of the test's process, and stays it."""
    monkeypatch.setattr(cli.signal, "signal", lambda *arguments: None)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")


def test_main_names_its_commands(capsys):
    for arguments in ([], ["--help"]):
        assert cli.main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    assert "no command is called 'trian'" in capsys.readouterr().err


def test_main_hands_on_arguments_and_status(monkeypatch):
    module = importlib.import_module("taid_jax.cli.evaluate")
    monkeypatch.setattr(module, "main", lambda arguments: len(arguments))
    assert cli.main(["evaluate", "--a", "--b", "--c"]) == 3


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_imports_nothing_that_takes_time(name):
    found = subprocess.run(
        [sys.executable, "-c", HELP, name], capture_output=True, text=True, check=True
    )
    shown, _, modules = found.stdout.rpartition("modules")
    assert "status 0" in shown
    assert f"usage: taid-jax {name} " in shown  # Not the file that is run.
    assert "Exit status: 0 done" in shown
    heavy = {"jax", "transformers", "orbax", "datasets", "matplotlib", "pyarrow"}
    assert not heavy & set(modules.split())


def test_package_and_scripts_have_the_same_commands():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["taid-jax"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main
    names = {"train_tpu": "train", "prepare_data": "prepare", "store_teacher": "store"}
    scripts = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}
    assert {names.get(stem, stem) for stem in scripts} == set(cli.COMMANDS) - {"plan"}
    for stem, path in scripts.items():
        assert f'main(["{names.get(stem, stem)}", *sys.argv[1:]])' in path.read_text()
