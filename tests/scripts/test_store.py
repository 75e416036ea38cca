"""A teacher's outputs stored, and a student trained from them in its place."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taid_jax.store.lots import Shard
from taid_jax.store.read import Store

TRAINING = (
    "--steps=12",
    "--eval-every=4",
    "--save-every=3",
    "--learning-rate=0.01",
    "--student-layers=2",
)


@pytest.fixture(scope="session")
def store(load_script):
    return load_script("store")


@pytest.fixture(scope="module")
def data(text):
    """Flags of the data, as the runs of `arguments` have them."""
    return [
        f"--data={text}",
        "--batch-size=8",
        "--seq-len=16",
        "--held-out-fraction=0.3",
    ]


@pytest.fixture(scope="module")
def stored(store, teacher, data, tmp_path_factory):
    """The hidden states of the teacher for the data, in several files."""
    folder = tmp_path_factory.mktemp("stored") / "store"
    with pytest.MonkeyPatch.context() as patch:
        _small_files(patch)
        assert store.main([f"--teacher={teacher}", *data, f"--output={folder}"]) == 0
    return folder


def _small_files(patch):
    """A file of each two lots, where a MiB would hold all there is."""
    from taid_jax.store import write

    plan = write.plan_shards

    def smaller(lots, columns, options):
        (whole,) = plan(lots, columns, dataclasses.replace(options, part="1/1"))
        pairs = [whole.lots[n : n + 2] for n in range(0, len(whole.lots), 2)]
        part, parts = options.place
        shards = [Shard(number, pair) for number, pair in enumerate(pairs)]
        return [each for each in shards if each.number % parts == part - 1]

    patch.setattr(write, "plan_shards", smaller)


def _digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def _train(train_tpu, teacher, folder, data, output, *flags):
    arguments = [f"--teacher-store={folder}", f"--student={teacher}", *data, *TRAINING]
    return train_tpu.main([*arguments, f"--output={output}", *flags])


def _refused(*arguments):
    """As `_train`; what one setting says of another is refused by the flags' parser."""
    try:
        return _train(*arguments)
    except SystemExit as error:
        return error.code


@pytest.mark.slow
def test_a_run_from_a_store_is_the_live_run_bit_for_bit(
    same_run, train_tpu, teacher, stored, finished, data, tmp_path
):
    run = tmp_path / "run"
    assert _train(train_tpu, teacher, stored, data, run) == 0
    same_run(run, finished)
    report = json.loads((run / "report.json").read_text())
    assert "its outputs are read from" in " ".join(report["notes"])
    assert (
        report["utilisation"]["teacher_flops"]
        < (
            json.loads((finished / "report.json").read_text())["utilisation"][
                "teacher_flops"
            ]
        )
    )


@pytest.mark.slow
def test_a_run_from_a_store_goes_on_and_knows_its_teacher(
    train_tpu, store, teacher, make_model, stored, finished, data, tmp_path, capsys
):
    run = tmp_path / "run"
    assert _train(train_tpu, teacher, stored, data, run, "--steps=6") == 0
    moved = tmp_path / "moved"
    shutil.copytree(stored, moved)
    assert _train(train_tpu, teacher, moved, data, run, "--resume") == 0
    other = make_model(seed=5)
    another = tmp_path / "another"
    assert store.main([f"--teacher={other}", *data, f"--output={another}"]) == 0
    capsys.readouterr()
    flags = "--resume", "--steps=14"
    assert _train(train_tpu, teacher, another, data, run, *flags) == 2
    assert "the teacher's weights" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--no-pack"], ["--grad-accum=2"]])
def test_other_layouts_from_a_store_are_the_live_run_too(
    rows_of, train_tpu, store, teacher, data, tmp_path, flags
):
    # Eight devices share each micro-batch, of which there are two.
    data = [*data, *flags, "--batch-size=16"]
    output = tmp_path / "store"
    assert store.main([f"--teacher={teacher}", *data, f"--output={output}"]) == 0
    live, found = tmp_path / "live", tmp_path / "found"
    arguments = [f"--teacher={teacher}", *data, *TRAINING, f"--output={live}"]
    assert train_tpu.main(arguments) == 0
    assert _train(train_tpu, teacher, output, data, found) == 0
    assert rows_of(found) == rows_of(live)


@pytest.mark.slow
def test_another_order_packing_and_batch_read_the_same_store(
    train_tpu, teacher, stored, data, tmp_path
):
    flags = ["--no-pack", "--batch-size=16", "--seed=3", "--steps=2", "--grad-accum=2"]
    mesh = "--mesh=data=4,fsdp=2,tensor=1"
    run = tmp_path / "run"
    assert _train(train_tpu, teacher, stored, data, run, *flags, mesh) == 0


def test_a_store_of_the_most_probable_tokens_evaluates_and_is_in_training_batches(
    load_script, store, teacher, finished, data, tmp_path
):
    from taid_jax.data import train_iterator
    from taid_jax.models import load_tokenizer
    from taid_jax.train.inputs import read_data

    evaluate = load_script("evaluate")
    output, path = tmp_path / "store", tmp_path / "scores.json"
    job = [f"--teacher={teacher}", *data, f"--output={output}", "--kind=topk", "--k=8"]
    assert store.main(job) == 0
    student = [f"--teacher-store={output}", f"--student={finished / 'student'}"]
    assert evaluate.main([*student, *data, f"--json={path}"]) == 0
    found = json.loads(path.read_text())
    live = json.loads((finished / "report.json").read_text())
    assert found["tokens"] == live["held_out_tokens"]
    assert found["student_perplexity"] == live["student_perplexity_after"]
    # Merging entries can only lower a KL; and it is positive.
    assert 0 < found["kl_teacher"] < live["kl_after"]
    opened = Store(output)
    settings = evaluate.parse([*student, *data]).settings
    train = read_data(settings, load_tokenizer(teacher), [opened]).train
    batch = next(train_iterator(train, 8, seed=0))
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            stored = opened.read(batch["input_ids"][row, here], int(here[0]))
            assert {"teacher_ids"} < stored.keys()
            for name, values in stored.items():
                np.testing.assert_array_equal(batch[name][row, here], values)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--kind=topk", "--k=8"],
        ["--kind=topk", "--sampled=12"],
        ["--store-dtype=bfloat16"],
    ],
    ids=["topk", "sampled", "bfloat16"],
)
def test_smaller_stores_teach_about_the_same(
    train_tpu, store, teacher, finished, data, tmp_path, flags, capsys
):
    output, run = tmp_path / "store", tmp_path / "run"
    job = [f"--teacher={teacher}", *data, f"--output={output}", *flags]
    assert store.main(job) == 0
    more = ["--steps=4"]
    if "--sampled=12" in flags:
        capsys.readouterr()
        assert _train(train_tpu, teacher, output, data, run, *more) == 2
        assert "need forward_kl with the drawn tokens" in capsys.readouterr().err
        more.append("--objective=forward_kl")
    assert _train(train_tpu, teacher, output, data, run, *more) == 0
    found = json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])
    live = json.loads((finished / "evaluations.jsonl").read_text().splitlines()[0])
    assert found["tokens"] == live["tokens"]
    assert found["student_perplexity"] == live["student_perplexity"]
    if "bfloat16" in flags[0]:
        # Rounded by 2^-9 at most, times the teacher's logits of some 10.
        assert abs(found["kl_teacher"] - live["kl_teacher"]) < 0.02
    elif "--k=8" in flags:
        # Merging entries can only lower a KL; and it is positive.
        assert 0 < found["kl_teacher"] < live["kl_teacher"]
        notes = json.loads((run / "report.json").read_text())["notes"]
        assert "of its probability on average" in " ".join(notes)


def test_columns_of_a_store_are_the_teachers(stored, teacher, data):
    """Read by token ids alone, against the teacher computed by itself."""
    from taid_jax.data import load_dataset
    from taid_jax.models import load_model
    from taid_jax.models.decoder import hidden_states

    model = load_model(teacher)
    opened = Store(stored)
    dataset = load_dataset(
        data[0].split("=")[1], model.tokenizer, seq_len=16, held_out_fraction=0.3
    )
    table = dataset.train.table
    assert len(opened) == opened.manifest.examples > 100
    assert all(opened.has(table[n].ids) for n in range(len(table)))
    batch = np.zeros((len(table), 16), np.int32)
    for number, row in enumerate(batch):
        row[: table.lengths[number]] = table[number].ids
    alone = jax.jit(lambda p, b: hidden_states(p, b, model.config))(
        model.params, {"input_ids": batch}
    )
    for row in range(len(dataset.train)):
        for start, number in dataset.train.placed(row):
            ids = table[number].ids
            found = opened.read(ids, start)["teacher_hidden"]
            # In another place of another batch: the last digits differ.
            wanted = alone[number, : len(ids)]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert not opened.has(np.arange(16, dtype=np.int32))


def test_a_job_that_is_stopped_goes_on_to_the_same_bytes(
    store, teacher, data, stored, tmp_path, monkeypatch, capsys
):
    from taid_jax.store import folder, write

    output = tmp_path / "store"
    _small_files(monkeypatch)
    job = [f"--teacher={teacher}", *data, f"--output={output}"]
    places = itertools.count()
    whole = write.write_whole

    def interrupted(path, content):
        if next(places) in stops:
            raise KeyboardInterrupt
        whole(path, content)

    for module in (folder, write):
        monkeypatch.setattr(module, "write_whole", interrupted)
    stops = {1, 6, 11}
    for _ in range(12):
        try:
            assert store.main(job) == 0
        except KeyboardInterrupt:
            continue
        break
    assert next(places) > 8
    assert _digests(output) == _digests(stored)
    capsys.readouterr()
    assert store.main(job) == 0
    files = len(Store(stored).manifest.shards)
    assert f" in {files} files; " in capsys.readouterr().out
    assert _digests(output) == _digests(stored)
    assert store.main([*job, "--seq-len=15"]) == 2
    assert "holds another store: " in capsys.readouterr().err


def test_shares_of_a_job_are_all_of_it(
    train_tpu, store, teacher, data, stored, tmp_path, capsys
):
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        _small_files(patch)
        for part in ("1/2", "2/2"):
            output = tmp_path / part[0]
            job = [f"--teacher={teacher}", *data, f"--output={output}"]
            assert store.main([*job, f"--part={part}"]) == 0
            found |= _digests(output)
    whole = _digests(stored)
    shards = [name for name in whole if name.endswith(".arrayrecord")]
    assert len(shards) > 3
    assert all(found[name] == whole[name] for name in shards)
    assert _train(train_tpu, teacher, tmp_path / "1", data, tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert re.search(r"lacks \d+ of \d+ examples, .* part 1/2 of the work", err), err


@pytest.fixture
def broken(stored, tmp_path):
    """A copy of a store, to be damaged."""
    folder = tmp_path / "broken"
    shutil.copytree(stored, folder)
    return folder


def _cut(folder):
    path = folder / "outputs-00001.arrayrecord"
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)


def _swap(folder):
    one, two = (folder / f"outputs-0000{n}.arrayrecord" for n in (1, 2))
    saved = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(saved)


def _edit(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": ', '"tokens": 1'))


def test_files_that_are_missing_are_stored_again(
    store, teacher, data, tmp_path, monkeypatch, capsys
):
    """As the message about a damaged file says; their mass counts once."""
    _small_files(monkeypatch)
    folder = tmp_path / "a [bold]store"
    kind = "--kind=topk", "--k=4"
    job = [f"--teacher={teacher}", *data, f"--output={folder}", *kind]
    assert store.main(job) == 0
    assert f"are stored in {folder};" in capsys.readouterr().out
    whole, times = _digests(folder), _times(folder)
    (folder / "outputs-00002.arrayrecord").unlink()
    (folder / "teacher" / "config.json").unlink()
    _cut(folder)
    assert store.main(job) == 0
    assert _digests(folder) == whole
    again = {name for name, time in _times(folder).items() if time != times[name]}
    assert again == {f"outputs-0000{n}.arrayrecord" for n in (1, 2)}


def _times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("outputs-*")}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "outputs-00001.arrayrecord has .* bytes; manifest.json says"),
        (_swap, "outputs-0000[12].arrayrecord (is not the shard|has) "),
        (_edit, "manifest.json was changed after it was written"),
        (lambda f: (f / "outputs-00002.arrayrecord").unlink(), "00002.* is missing"),
        (lambda f: (f / "manifest.json").unlink(), "holds no stored teacher"),
        (lambda f: (f / "head.safetensors").unlink(), "head.safetensors is missing"),
        (
            lambda f: (f / "teacher" / "config.json").write_text("{}"),
            "teacher/config.json has 2 bytes",
        ),
    ],
)
def test_a_damaged_store_is_one_message(
    train_tpu, teacher, broken, data, tmp_path, capsys, damage, message
):
    damage(broken)
    assert _train(train_tpu, teacher, broken, data, tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    assert not (tmp_path / "run").exists()


def test_a_damaged_record_is_named_when_it_is_read(stored, broken, text, teacher):
    from taid_jax.data import load_dataset
    from taid_jax.models import load_model
    from taid_jax.store.format import StoreError

    path = broken / "outputs-00000.arrayrecord"
    content = path.read_bytes()
    whole = Store(stored)
    fourth = whole.columns(int(whole.in_order()[3]))["teacher_hidden"].tobytes()
    place = content.index(fourth) + len(fourth) // 2
    path.write_bytes(content[:place] + os.urandom(8) + content[place + 8 :])
    opened = Store(broken)
    dataset = load_dataset(
        str(text), load_model(teacher).tokenizer, seq_len=16, held_out_fraction=0.3
    )
    faults = []
    for number in range(len(dataset.train.table)):
        ids = dataset.train.table[number].ids
        try:
            found = opened.read(ids)
        except StoreError as error:
            faults.append(str(error))
        else:
            for name, values in whole.read(ids).items():
                np.testing.assert_array_equal(found[name], values)
    assert faults
    for fault in faults:
        assert "outputs-00000.arrayrecord: record" in fault


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq-len=12"], "lacks .* examples, the first of them training example"),
        (["--teacher=x"], "teacher_store: need no teacher beside it, got both"),
        (["--texts=student", "--completion-tokens=4"], "in no store"),
        (["--resize-embeddings"], "the stored vocabulary is as it is"),
        (["--tail=uniform"], "tail: has no effect with a store of kind hidden"),
    ],
)
def test_what_a_store_cannot_do_is_refused(
    train_tpu, teacher, stored, data, tmp_path, capsys, flags, message
):
    assert _refused(train_tpu, teacher, stored, data, tmp_path / "run", *flags) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(message, err), err


def test_another_tokenizers_store_is_refused(
    train_tpu, make_model, stored, data, tmp_path, capsys
):
    other = make_model(vocab_size=290)
    assert _train(train_tpu, other, stored, data, tmp_path / "run") == 2
    assert "the tokenizers of teacher" in capsys.readouterr().err


def test_a_store_alone_makes_no_student(train_tpu, stored, data, tmp_path, capsys):
    arguments = [f"--teacher-store={stored}", *data, f"--output={tmp_path / 'run'}"]
    with pytest.raises(SystemExit, match="2"):
        train_tpu.main(arguments)
    err = " ".join(capsys.readouterr().err.split())
    assert "need --student or --student-config beside a store" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "output: need the folder of the store"),
        (["--output=OUT", "--k=4"], "k: has no effect with kind hidden"),
        (["--output=OUT", "--kind=topk", "--k=301"], "k: need at most 300"),
        (["--output=OUT", "--part=4/3"], "part: need N/M"),
        (["--output=TEXT"], "is not empty"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    store, teacher, data, text, tmp_path, capsys, flags, message
):
    places = {"OUT": str(tmp_path / "out"), "TEXT": str(text)}
    for name, place in places.items():
        flags = [flag.replace(name, place) for flag in flags]
    before = sorted(text.iterdir())
    assert store.main([f"--teacher={teacher}", *data, *flags]) == 2
    assert message in capsys.readouterr().err
    assert sorted(text.iterdir()) == before
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_refused_before_anything_is_computed(
    store, teacher, data, tmp_path, capsys, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    job = [f"--teacher={teacher}", *data, f"--output={tmp_path / 'out'}"]
    assert store.main(job) == 2
    assert "output: the store needs" in capsys.readouterr().err


def test_a_teacher_that_is_not_finite_is_refused(
    store, teacher, data, tmp_path, capsys
):
    broken = shutil.copytree(teacher, tmp_path / "teacher")
    (path,) = broken.glob("*.safetensors")
    arrays = {name: np.array(array) for name, array in load_file(path).items()}
    arrays["model.norm.weight"][0] = np.nan
    save_file(arrays, path)
    job = [f"--teacher={broken}", *data, f"--output={tmp_path / 'out'}"]
    assert store.main(job) == 2
    assert "the teacher: not finite on an example" in capsys.readouterr().err


@pytest.mark.slow
def test_a_store_and_its_runs_keep_the_day_of_the_chat_template(
    store, train_tpu, teacher, tmp_path
):
    """Else what is stored today is not found tomorrow."""
    template, chats = tmp_path / "chat.jinja", tmp_path / "chats.jsonl"
    template.write_text(
        "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}"
        "{{ eos_token }}{% endfor %}"
    )
    roles = ("user", "assistant")
    records = [
        {"messages": [{"role": r, "content": f"The ball {number}."} for r in roles]}
        for number in range(20)
    ]
    chats.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = [f"--data={chats}", f"--chat-template={template}", "--batch-size=8"]
    data += ["--seq-len=32", "--held-out-fraction=0.3"]
    folder = tmp_path / "store"
    job = [f"--teacher={teacher}", *data, f"--output={folder}"]
    assert store.main([*job, "--template-date=2024-02-29"]) == 0
    assert store.main(job) == 0
    assert _train(train_tpu, teacher, folder, data, tmp_path / "run", "--steps=4") == 0
    saved = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert "2024-02-29" in json.dumps(saved)
