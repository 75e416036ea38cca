import json

import pytest

from taid_jax.data.documents import make_document, parse_prompt


@pytest.fixture(scope="session")
def generate(load_script):
    return load_script("generate")


@pytest.fixture
def write_prompts(tmp_path):
    def write(records, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture
def run(generate, teacher, tmp_path):
    """Runs the script and returns its status and the rows that it wrote."""

    def run(prompts, *flags):
        output = tmp_path / "answers.jsonl"
        status = generate.main(
            [
                f"--prompts={prompts}",
                f"--output={output}",
                f"--model={teacher}",
                "--batch-size=8",
                "--max-new-tokens=6",
                *flags,
            ]
        )
        text = output.read_text() if output.exists() else ""
        return status, [json.loads(line) for line in text.splitlines()]

    return run


PROMPTS = [{"prompt": f"The {animal} sees the"} for animal in ("cat", "dog", "bird")]


def test_generate_writes_what_training_reads_and_overwrites_nothing(
    run, write_prompts, tmp_path, capsys
):
    path = write_prompts([*PROMPTS, {"prompt": "x", "completion": "old"}])
    status, rows = run(path)
    assert status == 0
    assert [row["number"] for row in rows] == [0, 1, 2, 3]
    assert [row["prompt"] for row in rows][:3] == [p["prompt"] for p in PROMPTS]
    for row in rows:
        answer = make_document(row, 0).content.messages[1].content
        assert answer.strip()
        assert answer != "old"
    assert "4 answers written" in capsys.readouterr().out

    status, kept = run(path, "--max-new-tokens=5")
    assert status == 2
    assert kept == rows
    message = capsys.readouterr().err
    assert "max_new_tokens: the file has 6, now 5" in message
    assert "--overwrite" in message
    (tmp_path / "answers.jsonl.job.json").unlink()
    assert run(path)[0] == 2
    assert run(path, "--overwrite") == (0, rows)


def test_generate_cut_off_goes_on_where_it_was(run, write_prompts, tmp_path):
    many = [{"prompt": f"The {n} cats see {n}"} for n in range(20)]
    drawn = ("--temperature=1.0", "--seed=3")
    path = write_prompts(many)
    _, whole = run(path, *drawn)
    output = tmp_path / "answers.jsonl"
    text = output.read_text()
    lines = text.splitlines(keepends=True)
    assert len(lines) > 12
    # Killed in the middle of a line of the second batch.
    output.write_text("".join(lines[:11]) + lines[11][:9])
    status, again = run(path, *drawn)
    assert status == 0
    assert again == whole
    # All is there: nothing is done.
    assert run(path, *drawn) == (0, whole)
    _, other = run(path, "--temperature=1.0", "--seed=4", "--overwrite")
    assert other != whole


@pytest.mark.parametrize(
    ("records", "flags", "message"),
    [
        ([{"text": "x"}], (), "line 1: need `prompt` or `messages`"),
        ([*PROMPTS, {"prompt": " "}], (), "line 4: `prompt` is empty"),
        ([], (), "is empty"),
        (
            [{"messages": [{"role": "user"}]}],
            (),
            "line 1: turn 1 needs `role` and `content`",
        ),
        (
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            (),
            "line 1: the conversation asks nothing",
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            (),
            "need a chat template",
        ),
        (PROMPTS, ("--max-new-tokens=63",), "no prompt leaves room"),
        (PROMPTS, ("--batch-size=3",), "cannot be shared out"),
        (PROMPTS, ("--model=nowhere/at-all.gguf",), "nowhere/at-all.gguf"),
    ],
)
def test_generate_bad_input_is_one_message(
    run, write_prompts, capsys, records, flags, message
):
    status, rows = run(write_prompts(records), *flags)
    assert status == 2
    assert not rows
    assert message in capsys.readouterr().err


def test_generate_of_a_broken_line_names_it(run, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt"\n')
    assert run(path)[0] == 2
    assert "line 3: not JSON" in capsys.readouterr().err
    assert run(tmp_path / "missing.jsonl")[0] == 2
    assert run(tmp_path / "prompts.csv")[0] == 2


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def talker(make_model):
    """A model whose tokenizer has a chat template."""
    folder = make_model(layers=2, seed=5)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_generate_answers_the_last_turn_of_conversations(run, talker, tmp_path):
    import pyarrow
    import pyarrow.parquet

    def turn(role, content):
        return {"role": role, "content": content}

    chats = [
        [turn("user", "The cat"), turn("assistant", "sees"), turn("user", "it")],
        [turn("user", "The dog"), turn("assistant", "an old answer")],
    ]
    path = tmp_path / "chats.parquet"
    table = pyarrow.table({"messages": chats})
    pyarrow.parquet.write_table(table, path)
    status, rows = run(path, f"--model={talker}", "--temperature=1.0")
    assert status == 0
    assert rows[0]["messages"][:3] == chats[0]
    assert rows[1]["messages"][:1] == chats[1][:1]
    for row, length in zip(rows, (4, 2), strict=True):
        assert len(row["messages"]) == length
        answer = row["messages"][-1]
        assert answer["role"] == "assistant"
        assert answer["content"].strip()
        assert answer["content"] != "an old answer"
        assert "<|end|>" not in answer["content"]


def test_encode_prompts_gives_the_ids_that_training_has_before_the_answer(talker):
    from taid_jax.data.chat import ChatRenderer
    from taid_jax.data.tokens import Encoder
    from taid_jax.models.files.tokenizer import load_tokenizer
    from taid_jax.train.on_policy.prompts import Prompt, encode_prompts

    tokenizer = load_tokenizer(str(talker))
    record = {"messages": [{"role": "user", "content": "The bird likes"}]}
    turns = [*record["messages"], {"role": "assistant", "content": "it"}]
    answered = make_document({"messages": turns}, 0).content
    rendered = ChatRenderer(tokenizer, train_on_prompts=False).chat(answered)
    [example] = Encoder(tokenizer).examples([rendered])
    asked = Prompt(0, "here", parse_prompt(record))
    [encoded] = encode_prompts([asked], tokenizer)
    assert encoded.ids == example.ids[: example.prompt].tolist()
