"""From raw conversations by a published recipe to a scored, exported student."""

import json

import pytest
import yaml

from taid_jax.recipes import find_recipe

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SIDES = {"train_sft": range(48), "test_sft": range(100, 116)}


@pytest.fixture
def prepared(load_script, teacher, tmp_path):
    """Flags of the data that `--preset ultrachat` makes of its schema, in little."""
    (tmp_path / "raw").mkdir()
    for name, numbers in SIDES.items():
        lines = []
        for number in numbers:
            question, thing = f"The cat {number}?", ("house", "ball")[number % 2]
            turns = [("user", question), ("assistant", f"takes the {thing}.")]
            messages = [{"role": role, "content": text} for role, text in turns]
            record = {"prompt": question, "prompt_id": str(number)}
            lines.append(json.dumps(record | {"messages": messages}) + "\n")
        (tmp_path / "raw" / f"{name}.jsonl").write_text("".join(lines))
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    flags = [
        "--preset=ultrachat",
        f"--data={tmp_path / 'raw'}",
        f"--tokenizer={teacher}",
        f"--chat-template={template}",
        f"--output={tmp_path / 'prepared'}",
        "--jobs=1",
    ]
    assert load_script("prepare_data").main(flags) == 0
    return {"data": str(tmp_path / "prepared"), "chat_template": str(template)}


@pytest.mark.slow
def test_recipe_from_conversations_to_a_scored_student(
    train_tpu, load_script, teacher, make_model, prepared, tmp_path
):
    recipe = {
        "base": str(find_recipe("pair", "zephyr_pythia").parents[1] / "published.yaml"),
        "teacher": str(teacher),
        # Another vocabulary, which the recipe fits to the teacher's.
        "student": str(make_model(layers=1, vocab_size=280, seed=3)),
        "data": {**prepared, "held_out_batches": 2},
        "batch_size": 8,
        "seq_len": 64,
        "eval_tokens": 8,
        "completion_tokens": 8,
        "buffer_capacity": 16,
        "learning_rate": 0.01,
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert train_tpu.main([f"--pair={path}", "--method=gkd"]) == 0
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    # 48 conversations are six batches of 8: five epochs, judged after each.
    assert report["settings"]["run"]["steps"] == 30
    rows = [
        json.loads(line)
        for line in (run / "evaluations.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [0, 6, 12, 18, 24, 30]
    trained = [row["rouge_l"] for row in rows[1:]]
    assert report["rouge_l_after"] == max(trained)
    assert report["loss_after"] < report["loss_before"]
    metrics = (run / "metrics.jsonl").read_text()
    sampled = [json.loads(line)["completions"] > 0 for line in metrics.splitlines()]
    assert 0 < sum(sampled) < 30

    scores = tmp_path / "scores.json"
    flags = [f"--config={run / 'settings.json'}", f"--student={run / 'student'}"]
    assert load_script("evaluate").main([*flags, f"--json={scores}"]) == 0
    found = json.loads(scores.read_text())
    # The same arithmetic on the same float32 master weights.
    for key in ("kl_teacher", "student_perplexity", "loss", "rouge_l", "exact_match"):
        assert found[key] == report[f"{key.removesuffix('_teacher')}_after"], key
    assert found["tokens"] == report["held_out_tokens"]

    torch = pytest.importorskip("torch", reason="reloads in transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = AutoModelForCausalLM.from_pretrained(run / "student")
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The cat 7?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert torch.isfinite(student(input_ids=ids).logits).all()
