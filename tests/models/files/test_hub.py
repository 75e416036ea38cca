"""What a model's name stands for, and clear words when it stands for nothing."""

import os
import pathlib

import huggingface_hub
import pytest

from taid_jax.errors import ModelError
from taid_jax.models.files import hub as source_module
from taid_jax.models.files.hub import DEFAULT_TEACHER, Source, resolve


def test_resolve_finds_files_and_folders(tmp_path, monkeypatch):
    for name, kind in (("m.gguf", "gguf"), ("config.json", "config")):
        (tmp_path / name).touch()
        assert resolve(str(tmp_path / name)).kind == kind
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tmp_path / "owner" / "name"
    model.mkdir(parents=True)
    assert resolve(model) == Source(str(model), model, "folder")
    assert resolve("~/owner/name").path == model
    # A path goes before a Hub id.
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").path == pathlib.Path("owner/name")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="give the folder that holds the model"):
        resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "no-such-folder",
        "../x",
        "a/b/c",
        "folder/model.gguf",
    ],
)
def test_resolve_says_what_would_do(name, tmp_path, monkeypatch):
    # Where nothing lies beside the folder that a relative name could mean.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ModelError, match=rf"Hub id .* or {DEFAULT_TEACHER}"):
        resolve(name)


def test_resolve_gets_the_default_teacher_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "fetch", lambda model: tmp_path / model.member)
    found = resolve(DEFAULT_TEACHER)
    assert found.kind == "gguf"
    assert found.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize("weights", [False, True])
def test_resolve_fetches_only_what_is_safe_from_the_hub(tmp_path, monkeypatch, weights):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name", weights=weights).path == tmp_path
    files = [
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "modeling_x.py",
        "onnx/model.safetensors",
        "original/params.json",
    ]
    wanted = huggingface_hub.utils.filter_repo_objects(
        files,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(wanted) == files[: 6 if weights else 5]


def test_resolve_says_so_when_the_hub_is_out_of_reach():
    # The suite runs with HF_HUB_OFFLINE=1.
    with pytest.raises(ModelError) as caught:
        resolve("owner/no-such-model-anywhere")
    text = str(caught.value)
    assert "'owner/no-such-model-anywhere' is no file or folder" in text
    assert "give the path of its folder" in text


@pytest.mark.parametrize("error", [OSError("unreachable"), RuntimeError("")])
def test_resolve_turns_any_failure_of_the_hub_into_one_message(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match="could not be fetched from the Hugging Face"):
        resolve("owner/name")


def test_resolve_never_waits_for_pipes(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    for name in ("pytorch_model.json", "tokenizer.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        os.mkfifo(folder / name)
        with pytest.raises(ModelError, match=f"{name} is no file"):
            resolve(folder)
    with pytest.raises(ModelError, match=r"m\.gguf is no file"):
        resolve(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["loop.gguf", "gone.gguf", "zero.gguf"])
def test_resolve_refuses_links_that_lead_to_no_file(tmp_path, name):
    targets = {"loop": "loop.gguf", "gone": "nothing", "zero": "/dev/zero"}
    (tmp_path / name).symlink_to(targets[name.partition(".")[0]])
    with pytest.raises(ModelError):
        resolve(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["a\ud800b", "x\0y", "owner/" + "x" * 5000, "~no-such-user/model"]
)
def test_resolve_names_what_it_cannot_find_in_few_words(name):
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert len(str(caught.value).encode()) < 1500
