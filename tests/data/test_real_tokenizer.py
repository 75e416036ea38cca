"""The default job's own tokenizer, with its template and its vocabulary of 49,152."""

import numpy as np
import pytest

from taid_jax.data import load_dataset
from taid_jax.data.chat import ChatRenderer
from taid_jax.data.documents import make_document
from taid_jax.data.tokens import Encoder

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("torch", reason="transformers reads GGUF with torch only")
    from transformers import AutoTokenizer

    from taid_jax.models.files.hub import SMOLLM2, fetch

    path = fetch(SMOLLM2)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_smollm2_counts_exactly_the_answers(smollm2, make_conversations):
    renderer = ChatRenderer(smollm2, train_on_prompts=False)
    conversations = make_conversations(200)
    items = [
        renderer.chat(make_document({"messages": m}, 0).content) for m in conversations
    ]
    for messages, example in zip(
        conversations, Encoder(smollm2).examples(items), strict=True
    ):
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        text = smollm2.decode(example.ids[example.counted].tolist())
        assert text == "".join(answer + "<|im_end|>" for answer in answers)


def test_smollm2_keeps_the_ids_of_the_whole_text(smollm2, make_conversations):
    renderer = ChatRenderer(smollm2, train_on_prompts=False)
    for messages in make_conversations(50, edges=[""]):
        item = renderer.chat(make_document({"messages": messages}, 0).content)
        [example] = Encoder(smollm2).examples([item])
        whole = smollm2.apply_chat_template(messages, return_dict=False)
        assert example.ids.tolist() == whole


def test_smollm2_reads_the_built_in_corpus(smollm2):
    info = load_dataset("pydoc", smollm2, seq_len=256).info
    # 91,000 tokens under Python 3.11, 97,000 under 3.12.
    assert 80_000 < info.train.tokens + info.held_out.tokens < 130_000
    share = info.held_out.tokens / (info.held_out.tokens + info.train.tokens)
    np.testing.assert_allclose(share, 0.1, atol=0.06)  # documents differ in length
