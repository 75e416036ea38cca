"""Every command line of README and docs: it parses as it stands, and it runs.

What each command's own parser makes of its line is checked for all of them, with all
checks of settings. Those that train, judge, answer or prepare are run as well, with
tiny models and data in place of what they name.
"""

import argparse
import importlib.util
import json
import pathlib
import re
import shlex
import sys
import tomllib

import pytest
import tyro

from taid_jax import cli

ROOT = pathlib.Path(__file__).parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
# In fenced blocks, between backticks, or indented; the last two only with arguments.
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\S+/time -v )?(?:python|pip|pytest|taid-jax \w+) .+", re.S
)
INDENTED = re.compile(r"^ {4,}((?:python|pip|pytest) .+)$", re.M)

# Why a line is only parsed here.
NOT_RUN = {
    "--plan": "needs the TPU compiler: tests/plan, marker tpu_compiler",
    "--coordinator": "two processes: test_launch.py, test_many_hosts.py",
    "--help": "nothing to run",
}


def _commands():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        blocks = "\n".join(body for kind, body in BLOCK.findall(text) if kind == "bash")
        rest = BLOCK.sub("", text)
        spans = [span for span in re.findall(r"`([^`]+)`", rest) if COMMAND.match(span)]
        lines = re.sub(r"\\\n\s*", " ", blocks).splitlines()
        for line in [*lines, *spans, *INDENTED.findall(rest)]:
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                name = f"{path.name}: {' '.join(words[:end])}"
                yield pytest.param(words[:end], id=name[:80])
                words = words[end + 1 :]


COMMANDS = list(_commands())


class _Parsed(BaseException):
    """What a command's parser made of its line; nothing catches it."""


@pytest.fixture
def parse(load_script, monkeypatch, tmp_path):
    """Parses `python ...` as the command itself does, and goes no further."""
    monkeypatch.chdir(ROOT)
    settings = tmp_path / "RUN" / "settings.json"
    settings.parent.mkdir()
    settings.write_text("{}")

    def stop(call):
        def called(*arguments, **options):
            raise _Parsed(call(*arguments, **options))

        return called

    def run(words):
        monkeypatch.setattr(tyro, "cli", stop(tyro.cli))
        monkeypatch.setattr(
            argparse.ArgumentParser,
            "parse_args",
            stop(argparse.ArgumentParser.parse_args),
        )
        if words[0] in cli.COMMANDS:
            main = load_script(words[0]).main
            words = words[1:]
        elif words[0] == "-m":
            main = importlib.import_module(f"{words[1]}.__main__").main
            words = words[2:]
        else:
            path, *words = words
            assert (ROOT / path).is_file()
            if path.startswith("scripts/"):
                main = load_script(pathlib.Path(path).stem).main
            else:
                spec = importlib.util.spec_from_file_location("benchmark", ROOT / path)
                module = importlib.util.module_from_spec(spec)
                monkeypatch.setitem(sys.modules, "benchmark", module)
                spec.loader.exec_module(module)
                main = module.main
        main([word.replace("RUN/", f"{settings.parent}/") for word in words])

    return run


def test_commands_are_found_in_all_files():
    names = [command.id.partition(":")[0] for command in COMMANDS]
    fenced = {path.name for path in FILES if "```bash" in path.read_text("utf-8")}
    assert set(names) >= fenced >= {"README.md", "command_line.md", "recipes.md"}
    assert len(names) > 25
    assert sum("train_tpu.py" in command.id for command in COMMANDS) >= 10


@pytest.mark.parametrize("words", COMMANDS)
def test_documented_command_line_parses_as_it_stands(parse, words):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    while "=" in words[0]:  # variables of the environment
        words = words[1:]
    if words[0].endswith("time"):  # /usr/bin/time -v
        words = words[2:]
    program, *rest = words
    if program == "pip":
        extras = re.findall(r"\[(.*?)\]", " ".join(rest))
        assert set(extras) <= set(project["project"]["optional-dependencies"])
        assert rest[0] == "install"
        return
    if program == "pytest":
        markers = project["tool"]["pytest"]["ini_options"]["markers"]
        if "-m" in rest:
            marker = rest[rest.index("-m") + 1]
            assert any(each.startswith(f"{marker}:") for each in markers)
        paths = [word for word in rest if word.startswith("tests")]
        assert all((ROOT / path).exists() for path in paths)
        return
    if program == "mkdocs":
        assert rest == ["serve"]
        assert (ROOT / "mkdocs.yml").is_file()
        return
    assert program in ("python", "taid-jax"), words
    if "--help" in rest:
        with pytest.raises(SystemExit) as caught:
            parse(rest)
        assert caught.value.code == 0
        return
    with pytest.raises(_Parsed):
        parse(rest)


RUNS = ("train_tpu", "evaluate", "generate", "prepare_data")


def _run_lines():
    for command in COMMANDS:
        words = command.values[0]
        names = [pathlib.Path(word).stem for word in words if word.endswith(".py")]
        if names and names[0] in RUNS and not NOT_RUN.keys() & {*words}:
            flags = words[words.index(f"scripts/{names[0]}.py") + 1 :]
            yield pytest.param(names[0], flags, id=command.id)


@pytest.fixture(scope="module")
def tiny(make_model, tmp_path_factory):
    """What stands in for the models, data and folders that the lines name."""
    folder = tmp_path_factory.mktemp("docs")
    models = []
    for layers in (12, 2):
        models.append(
            make_model(layers=layers, max_position_embeddings=2048, num_kv_heads=2)
        )
        (models[-1] / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        )
    chats = folder / "chats"
    chats.mkdir()
    for name, count in (("train_sft", 40), ("test_sft", 8)):
        records = [
            {
                "prompt_id": f"{name} {number}",
                "solution": "It runs.",
                "messages": [
                    {"role": "user", "content": f"The {name} cat {number}?"},
                    {"role": "assistant", "content": "runs " * (1 + number % 5)},
                ],
            }
            for number in range(count)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (chats / f"{name}.jsonl").write_text(text)
    return {
        "teacher": models[0],
        "student": models[1],
        "chats": chats,
        "folder": folder,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flags"), list(_run_lines()))
def test_documented_command_line_runs_on_tiny_models(
    load_script, tiny, tmp_path, monkeypatch, script, flags
):
    teacher, chats = tiny["teacher"], tiny["chats"]
    prompts = chats / "test_sft.jsonl"
    monkeypatch.chdir(ROOT)
    small = {
        "train_tpu": [
            f"--teacher={teacher}",
            f"--output={tmp_path / 'run'}",
            "--steps=1",
            "--held-out-batches=1",
            "--mesh=fsdp=4,tensor=2",
        ],
        "evaluate": [f"--student={teacher}", f"--json={tmp_path / 'scores.json'}"],
        "generate": [
            f"--model={teacher}",
            f"--prompts={prompts}",
            f"--output={tmp_path / 'answers.jsonl'}",
            "--max-new-tokens=4",
            "--mesh=fsdp=4,tensor=2",
        ],
        "prepare_data": [
            f"--tokenizer={teacher}",
            f"--data={chats}",
            f"--output={tmp_path / 'shards'}",
            "--jobs=1",
        ],
    }[script]
    if script == "train_tpu":
        recipe = {"--config", "--pair"} & {*flags}
        if "self" in flags:  # Its student is its teacher.
            del small[0]
        if "--data" in flags or recipe:
            small.append(f"--data={chats}")
        if "--student" in flags or recipe:
            small.append(f"--student={tiny['student']}")
        if "--seq-len" in flags or recipe:  # of hours
            accumulated = "--grad-accum" in flags
            small += ["--seq-len=64", f"--batch-size={32 if accumulated else 4}"]
        if recipe:
            small += ["--epochs=None", "--eval-prompts=2", "--eval-tokens=4"]
    if script == "evaluate":
        settings = tmp_path / "settings.json"
        values = {"teacher": str(teacher), "data": {"data": str(chats)}, "seq_len": 64}
        settings.write_text(json.dumps({**values, "mesh": "fsdp=4,tensor=2"}))
        flags = [*flags, f"--config={settings}"]
    assert load_script(script).main([*flags, *small]) == 0
