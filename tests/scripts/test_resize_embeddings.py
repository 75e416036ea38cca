"""A student with another tokenizer: refused, or resized to that of the teacher."""

import json

import pytest


@pytest.mark.slow
def test_train_tpu_resizes_a_student_with_another_tokenizer(
    train_tpu, arguments, teacher, make_model, tmp_path, capsys
):
    transformers = pytest.importorskip("transformers")
    from taid_jax.models.files.load import load_model

    student = make_model(layers=1, vocab_size=280, seed=3)
    flags = [flag for flag in arguments if not flag.startswith("--student")]
    flags += [f"--student={student}", "--steps=2", "--eval-every=0", "--save-every=0"]
    assert train_tpu.main(flags) == 2
    assert "--resize-embeddings" in capsys.readouterr().err
    assert train_tpu.main([*flags, "--resize-embeddings"]) == 0
    exported = tmp_path / "run" / "student"
    theirs = transformers.AutoTokenizer.from_pretrained(teacher)
    ours = transformers.AutoTokenizer.from_pretrained(exported)
    assert ours.get_vocab() == theirs.get_vocab()
    config = json.loads((exported / "config.json").read_text())
    assert config["vocab_size"] == len(theirs) == 300
    assert load_model(exported).params["embed"]["embedding"].shape == (300, 16)
