"""GGUF files: what the gguf package reads, and nothing that misleads."""

import struct

import gguf
import numpy as np
import pytest

from taid_jax.errors import ModelError
from taid_jax.models.files.gguf import open_gguf

TYPE = gguf.GGUFValueType
KINDS = [
    gguf.GGMLQuantizationType[name]
    for name in (
        *("Q4_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M"),
        *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0", "MXFP4"),
    )
]
KEYS = {
    "a.uint8": (200, TYPE.UINT8),
    "a.int16": (-5, TYPE.INT16),
    "a.uint64": (2**60, TYPE.UINT64),
    "a.float64": (0.1, TYPE.FLOAT64),
    "a.bool": (True, TYPE.BOOL),
    "a.text": ("grüße", TYPE.STRING),
}


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def patched(path, old, new):
    """Replaces bytes that are there once."""
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def refusal(path):
    with pytest.raises(ModelError) as caught:
        open_gguf(path)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_open_gguf_agrees_with_the_gguf_package(tmp_path, write_gguf, kind):
    path = tmp_path / "m.gguf"

    def arrays(writer):
        writer.add_array("a.numbers", [1, -2, 3])
        writer.add_array("a.texts", ["x", "", "yz"])

    write_gguf(path, kind=kind, keys=KEYS, tokens=arrays)
    header, reader = open_gguf(path), gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert header.metadata[key] == field.contents(), key
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.kind == tensor.tensor_type
        assert info.offset == tensor.data_offset
        assert np.prod(info.shape[:-1]) * info.row_bytes == tensor.n_bytes


def test_open_gguf_follows_another_alignment(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    for name in ("a", "b"):
        writer.add_tensor(name, np.ones(3, np.float32))
    close(writer)
    offsets = [info.offset for info in open_gguf(path).tensors.values()]
    assert offsets == [tensor.data_offset for tensor in gguf.GGUFReader(path).tensors]
    assert offsets[1] - offsets[0] == 256


def test_open_gguf_refuses_counts_beyond_the_file_at_once(tmp_path, write_gguf):
    # An array that claims 2**60 numbers must not be walked.
    path = tmp_path / "m.gguf"
    write_gguf(path, tokens=lambda writer: writer.add_array("a.numbers", [7, 8, 9]))
    head = text("a.numbers") + struct.pack("<II", TYPE.ARRAY, TYPE.INT32)
    patched(path, head + struct.pack("<Q", 3), head + struct.pack("<Q", 2**60))
    assert "ends in the middle of its header" in refusal(path)


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "keys"])
@pytest.mark.parametrize("count", [2**63, 10**6])
def test_open_gguf_refuses_impossible_counts(tmp_path, write_gguf, at, count):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    content = bytearray(path.read_bytes())
    content[at : at + 8] = struct.pack("<Q", count)
    path.write_bytes(content)
    assert "is damaged or no GGUF file" in refusal(path)


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24], ids=["0", "1", "4", "big-end"])
def test_open_gguf_refuses_other_versions(tmp_path, write_gguf, version):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack("<I", version) + content[8:])
    assert f"version {version}" in refusal(path)


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ((2, 64, 41, 0, 0), "instead of"),
        ((2, 64, 40, 0, 32), "lies at 32"),
        ((2, 64, 40, 99, 0), "unknown type 99"),
        ((9, 64, 40, 0, 0), "9 dimensions"),
        ((2, 64, 0, 0, 0), "the shape"),
        ((2, 63, 40, 2, 0), "in blocks of 32"),
        ((2, 2**62, 40, 0, 0), "it ends before"),
    ],
)
def test_open_gguf_refuses_tensors_that_do_not_follow_each_other(
    tmp_path, write_gguf, new, words
):
    path, name = tmp_path / "m.gguf", text("token_embd.weight")
    write_gguf(path)
    # Dimensions, type and offset stand behind the name.
    pack = struct.Struct("<IQQIQ").pack
    patched(path, name + pack(2, 64, 40, 0, 0), name + pack(*new))
    assert words in refusal(path)


def test_open_gguf_refuses_the_same_name_twice(tmp_path, write_gguf):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    patched(path, text("blk.0.attn_v.weight"), text("blk.0.attn_k.weight"))
    assert "blk.0.attn_k.weight is there twice" in refusal(path)
    write_gguf(path)
    patched(path, text("llama.block_count"), text("llama.vocab_sizee"))
    assert open_gguf(path).metadata["llama.vocab_sizee"] == 2
    write_gguf(path, keys={"a.aa": KEYS["a.bool"], "a.bb": KEYS["a.bool"]})
    patched(path, text("a.aa"), text("a.bb"))
    assert "the key a.bb is there twice" in refusal(path)


def test_open_gguf_refuses_texts_that_are_not_utf8(tmp_path, write_gguf):
    path = tmp_path / "m.gguf"
    write_gguf(path, keys=KEYS)
    patched(path, "grüße".encode(), b"gr\xff\xfe\xff\xffe")
    assert "is not UTF-8" in refusal(path)


def test_open_gguf_says_when_there_is_no_file(tmp_path):
    assert "No such file" in refusal(tmp_path / "m.gguf")


def test_read_dequantises_every_type_that_the_gguf_package_undoes(tmp_path):
    # Random blocks; their scales may be infinite or no number, which stays so.
    generator, blocks = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for kind in KINDS:
        size = 256 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
        blocks[kind] = generator.integers(0, 256, (3, size), np.uint8)
        writer.add_tensor(kind.name, blocks[kind], raw_dtype=kind)
    close(writer)
    file = open_gguf(tmp_path / "m.gguf")
    for kind, raw in blocks.items():
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(raw, kind)
        found = file.read(kind.name, (slice(1, 3), slice(5, 250)))
        np.testing.assert_array_equal(found, expected[1:, 5:250])


def test_load_model_names_types_that_cannot_be_dequantised(tmp_path, write_gguf):
    extra = {"strange.weight": np.ones(16, np.int32)}
    write_gguf(tmp_path / "m.gguf", extra=extra)
    assert "strange.weight (I32)" in refusal(tmp_path / "m.gguf")


def test_read_returns_a_part_of_a_vector(tmp_path, write_gguf):
    _, state = write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    norm = open_gguf(tmp_path / "m.gguf").read("output_norm.weight", (slice(3, 9),))
    np.testing.assert_array_equal(norm, state["model.norm.weight"][3:9])


def test_read_says_when_the_file_was_cut_off_meanwhile(tmp_path, write_gguf):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    file = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="cut off while it was read"):
        file.read("output.weight", (slice(0, 40), slice(0, 64)))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" + bytes(100)])
def test_load_model_refuses_what_is_no_gguf_file(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert str(path) in refusal(path)
