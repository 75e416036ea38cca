import dataclasses
import json
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.data.batches import ExampleSet, train_iterator
from taid_jax.data.packing import make_table, pack_rows
from taid_jax.data.tokens import Example
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params, init_params, param_axes
from taid_jax.models.generation import generate, prepare
from taid_jax.models.sampling import GREEDY, SamplingParams
from taid_jax.settings import OnPolicySettings, SettingsError, from_dict
from taid_jax.sharding import make_mesh, tree_shardings
from taid_jax.train.checkpoint import Checkpoints, read_run
from taid_jax.train.evaluate import HeldOut
from taid_jax.train.loop import Loop
from taid_jax.train.on_policy import rules
from taid_jax.train.on_policy import texts as tx
from taid_jax.train.on_policy.generation import Completer
from taid_jax.train.report import read_lines
from taid_jax.train.step import next_token_labels
from taid_jax.train.throughput import Throughput

SEQ_LEN, NEW, BATCH, END = 16, 6, 8, 3
ROWS = 40
CONFIG = DecoderConfig(
    vocab_size=22,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_position_embeddings=32,
    initializer_range=0.4,
)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def examples():
    """Forty rows of 6 to 16 tokens; the prompts of a few leave no room."""
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(ROWS):
        length = int(rng.integers(6, SEQ_LEN + 1))
        prompt = int(rng.integers(2, length))
        if number % 8 == 3:
            length, prompt = 15, 12
        ids = rng.integers(4, CONFIG.vocab_size, length).astype(np.int32)
        counted = np.arange(length) >= prompt
        counted[2] = True  # an earlier answer
        pairs.append((number, Example(ids, counted, prompt, length)))
    return ExampleSet(
        make_table(pairs), [(n,) for n in range(ROWS)], SEQ_LEN, pad_id=0, packed=False
    )


@pytest.fixture(scope="module")
def packed(examples):
    rows = pack_rows(examples.table.lengths.tolist(), SEQ_LEN)
    return dataclasses.replace(examples, rows=rows, packed=True)


def settings(texts, **values):
    return OnPolicySettings(texts, completion_tokens=NEW, **values)


def complete_on(mesh, params, sampling=GREEDY, rows=BATCH):
    shapes = abstract_params(CONFIG)
    shardings = tree_shardings(param_axes(CONFIG), shapes, mesh)
    complete = Completer(
        CONFIG,
        mesh,
        shardings=shardings,
        ends=(END,),
        max_new_tokens=NEW,
        dtype=jnp.float32,
        rows=rows,
        sampling=sampling,
        seed=1,
    )
    return complete, jax.device_put(params, shardings)


@pytest.fixture(scope="module")
def greedy(params):
    """The student's greedy completions on one device."""
    mesh = make_mesh("data=1", jax.devices()[:1])
    return complete_on(mesh, params)[0]


class Writer:
    """Stands for a model: completions by what it is asked, and what it was asked."""

    def __init__(self, *, length=NEW, end=False):
        self.asked, self.length, self.end = [], length, end

    def __call__(self, params, prompts, numbers):
        self.asked += numbers
        found = []
        for prompt, (number, epoch) in zip(prompts, numbers, strict=True):
            rng = np.random.default_rng([number, epoch, *prompt.tolist()])
            said = rng.integers(4, CONFIG.vocab_size, self.length).astype(np.int32)
            said[-1] = END if self.end else said[-1]
            found.append(said)
        return found


@pytest.fixture
def make_batches(examples):
    def make(chosen, complete, *, threshold=0.0, data=examples, **options):
        options = {"batch_size": BATCH, "steps": 100, "seed": 5} | options
        batches = tx.OnPolicyBatches(chosen, data, complete, ends=(END,), **options)
        batches.threshold, batches.held_out_loss = threshold, 1.0
        return batches

    return make


def take(batches, steps, params=()):
    steps = [steps] if isinstance(steps, int) else steps
    return [
        batches.batch(*[{} if params == () else params] * 2, n, Throughput())
        for n in steps
    ]


def texts_of(batch):
    """The tokens of every example of a batch."""
    segments = batch.get("segment_ids", batch.get("attention_mask"))
    return [
        tuple(ids[segment == number].tolist())
        for ids, segment in zip(batch["input_ids"], segments, strict=True)
        for number in range(1, segment.max() + 1)
    ]


def kept(batches):
    return [tuple(each.example.ids.tolist()) for each in batches.buffer]


def assert_equal(left, right):
    assert left.keys() == right.keys()
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_batches_puts_the_students_completions_behind_the_prompts(
    make_batches, examples, params, greedy
):
    batches = make_batches(settings("adaptive"), greedy, threshold=1.0)
    [found] = take(batches, 1, params)
    assert found.keys() == {"input_ids", "labels", "attention_mask"}
    width = SEQ_LEN - NEW
    asked = {}
    for number in range(ROWS):
        ids, counted, prompt, *_ = examples.table[number]
        if prompt <= width:
            asked[tuple(ids[:prompt].tolist())] = counted[:prompt]
    for row in range(BATCH):
        ids = found["input_ids"][row]
        prompt = max((p for p in asked if tuple(ids[: len(p)].tolist()) == p), key=len)
        answer = generate(
            prepare(params, CONFIG, unroll=False),
            CONFIG,
            jnp.asarray([(0,) * (width - len(prompt)) + prompt]),
            jnp.asarray([(0,) * (width - len(prompt)) + (1,) * len(prompt)]),
            max_new_tokens=NEW,
            eos_token_ids=(END,),
            pad_token_id=-1,
        ).tokens
        new = [token for token in np.asarray(answer)[0].tolist() if token >= 0]
        whole = [*prompt, *new]
        rest = SEQ_LEN - len(whole)
        assert ids.tolist() == whole + [0] * rest
        counted = asked.pop(prompt)
        earlier = [t if c else -100 for t, c in zip(prompt, counted, strict=True)]
        assert found["labels"][row].tolist() == earlier + new + [-100] * rest
        mask = [1] * len(whole) + [0] * rest
        assert found["attention_mask"][row].tolist() == mask
    assert len(batches.buffer) == BATCH


@pytest.mark.parametrize("texts", ["mixed:0", "adaptive"])
@pytest.mark.parametrize("name", ["examples", "packed"])
def test_batches_of_the_data_are_those_of_a_run_on_the_data(
    make_batches, request, texts, name
):
    data = request.getfixturevalue(name)
    batches = make_batches(settings(texts), Writer(), data=data)
    wanted = train_iterator(data, BATCH, seed=5, prefetch=0)
    for step in range(1, 12):
        [found] = take(batches, step)
        assert_equal(found, next(wanted))
    assert len(batches.buffer) == 0
    assert float(batches.metrics()["completions"]) == 0


def test_mixed_answers_a_batch_and_trains_on_a_draw_from_the_buffer(make_batches):
    writer = Writer()
    batches = make_batches(settings("mixed:1", buffer_capacity=20), writer)
    take(batches, 1)
    first = set(kept(batches))
    [found] = take(batches, 2)
    everything, drawn = set(kept(batches)), set(texts_of(found))
    assert len(everything) == len(writer.asked) == 2 * BATCH
    assert len(drawn) == BATCH
    assert drawn <= everything
    assert drawn & first
    assert drawn - first
    take(batches, 3)
    assert len(batches.buffer) == 20


def test_batches_draws_by_seed_and_step_alone(make_batches):
    chosen = settings("mixed:0.5", buffer_capacity=20)
    kinds = []
    for seed in (5, 5, 6):
        batches = make_batches(chosen, Writer(), seed=seed)
        for step in range(1, 21):
            take(batches, step)
            kinds.append(float(batches.metrics()["completions"]) > 0)
    first, again, other = kinds[:20], kinds[20:40], kinds[40:]
    assert first == again
    assert first != other
    assert 3 < sum(first) < 17


@pytest.mark.parametrize("texts", ["student", "pairs", "mixed:1", "mixed:0"])
def test_batches_of_two_processes_gives_the_batch_of_one(make_batches, texts):
    whole = take(make_batches(settings(texts), Writer()), [1, 2])
    parts = [
        take(
            make_batches(settings(texts), Writer(), process_index=n, process_count=2),
            [1, 2],
        )
        for n in range(2)
    ]
    for step, batch in enumerate(whole):
        pieces = [part[step] for part in parts]
        joined = {name: np.concatenate([p[name] for p in pieces]) for name in batch}
        assert_equal(joined, batch)


@pytest.mark.slow
@pytest.mark.multidevice
def test_completions_are_the_same_on_eight_devices_packed_or_not(
    make_batches, examples, packed, params
):
    """Drawn ones too: what is drawn depends on seed, example and epoch alone."""
    fitting = int(rules.prompts_with_room(settings("student"), examples).sum())
    found = []
    for place, devices, rows, data in (
        ("data=1", 1, BATCH, examples),
        ("data=2,fsdp=2,tensor=2", 8, BATCH, examples),
        ("data=1", 1, 3, packed),
    ):
        mesh = make_mesh(place, jax.devices()[:devices])
        complete, placed = complete_on(mesh, params, SamplingParams(1.0), rows)
        written = {}

        def recorded(params, prompts, numbers, complete=complete, written=written):
            said = complete(params, prompts, numbers)
            written |= {
                key: each.tolist() for key, each in zip(numbers, said, strict=True)
            }
            return said

        # All the prompts of an epoch.
        chosen = settings("student", rollout_batch=fitting)
        take(make_batches(chosen, recorded, data=data), 1, placed)
        found.append({key: said for key, said in written.items() if key[1] == 0})
    assert len(found[0]) == fitting
    assert found[0] == found[1] == found[2]
    # Each example, and each epoch of it, has draws of its own.
    numbers = [(0, 0), (0, 1), (1, 0), (0, 0)]
    first, *others, again = complete(placed, [[5, 6, 7]] * 4, numbers)
    assert first.tolist() == again.tolist()
    assert len({tuple(said) for said in (first, *others)}) == 3


def test_student_trains_once_on_every_completion_of_a_window(make_batches, examples):
    writer = Writer()
    batches = make_batches(settings("student", rollout_batch=3 * BATCH), writer)
    found, asked = [], []
    for step in range(1, 7):
        [batch] = take(batches, step)
        found += texts_of(batch)
        asked.append(len(writer.asked))
        assert float(batches.metrics()["completion_age"]) == (step - 1) % 3
    # Two windows, each before the first of its batches; nothing is left over.
    assert asked == [3 * BATCH] * 3 + [6 * BATCH] * 3
    assert len(set(found)) == len(found) == 6 * BATCH
    assert len(batches.buffer) == 0
    # The prompts of an epoch come once, with a draw of their own in the next.
    fitting = int(rules.prompts_with_room(settings("student"), examples).sum())
    assert len({number for number, epoch in writer.asked[:fitting]}) == fitting
    epochs = [epoch for _, epoch in writer.asked]
    assert epochs == [0] * fitting + [1] * (6 * BATCH - fitting)
    assert batches.summary(str)["trained_by_age"] == {"0": 16, "1": 16, "2": 16}


def test_completions_are_used_as_often_as_reuse_says(make_batches):
    writer = Writer()
    chosen = settings("student", rollout_batch=3, reuse=2)
    batches = make_batches(chosen, writer)
    uses = [text for batch in take(batches, range(1, 9)) for text in texts_of(batch)]
    assert len(uses) == 8 * BATCH
    times = [uses.count(text) for text in set(uses)]
    assert set(times) == {1, 2}
    # All but what is left in the buffer were used twice.
    assert times.count(1) == sum(each.uses == 1 for each in batches.buffer)
    assert len(writer.asked) == times.count(2) + len(batches.buffer)
    assert batches.buffer.unused == 0


def test_completions_are_packed_into_full_rows(make_batches, packed):
    writer = Writer(length=2, end=True)
    batches = make_batches(settings("student"), writer, data=packed, batch_size=2)
    found = take(batches, range(1, 6))
    for batch in found:
        assert batch["segment_ids"].shape == (2, SEQ_LEN)
    assert max(batch["segment_ids"].max() for batch in found) > 1
    everything = [text for batch in found for text in texts_of(batch)]
    assert len(set(everything)) == len(everything) > 5 * 2
    # No row has room for what the next step begins with: a batch ends when it is full.
    with_room = [(batch["segment_ids"] > 0).sum() for batch in found]
    assert min(with_room) > SEQ_LEN


def test_what_is_not_there_of_a_truncated_completion_is_not_taught(make_batches):
    for end in (False, True):
        batches = make_batches(settings("student"), Writer(length=4, end=end))
        [batch] = take(batches, 1)
        taught = np.asarray(next_token_labels(batch))
        last = batch["attention_mask"].sum(axis=1)
        rows = np.arange(BATCH)
        # The last token has nothing to predict; the one before it predicts it.
        assert (taught[rows, last - 1] == -100).all()
        assert ((taught[rows, last - 2] == END) == end).all()
        found = batches.metrics()
        assert float(found["completion_truncated"]) == (not end)
        assert float(found["completion_length"]) == 4
        assert batches.summary(str)["written"] == {
            "ended" if end else "truncated": BATCH
        }


def test_empty_completions_are_counted_and_for_ever_an_error(make_batches):
    batches = make_batches(settings("student"), Writer(length=1, end=True))
    take(batches, 1)
    assert float(batches.metrics()["completion_empty"]) == 1
    again = make_batches(settings("student"), Writer(length=1, end=True))
    again.set_state(json.loads(json.dumps(batches.get_state())))
    take(again, range(2, tx._PATIENCE // BATCH))
    with pytest.raises(
        SettingsError, match=r"texts student: the last 256 .* are empty"
    ):
        take(again, tx._PATIENCE // BATCH)


class Silent:
    def step(self, row): ...

    def evaluation(self, row): ...

    def say(self, text): ...


def complete_by_weights(params, prompts, numbers):
    """Stands for generation: other weights, other completions."""
    weights = zlib.crc32(np.asarray(params["mix"]["kernel"]).tobytes())
    draws = [np.random.default_rng((weights, *number)) for number in numbers]
    return [
        rng.integers(3, CONFIG.vocab_size, rng.integers(1, NEW + 1)).astype(np.int32)
        for rng in draws
    ]


@pytest.mark.parametrize(
    ("values", "killed"),
    [
        # Before a window, in the middle of one, and after an evaluation, which alone
        # moves the threshold; packed with pairs.
        ({"texts": "student", "rollout_batch": 3 * BATCH}, 6),
        ({"texts": "student", "rollout_batch": 3 * BATCH, "reuse": 2}, 7),
        ({"texts": "mixed:0.7", "rollout_batch": 3 * BATCH}, 7),
        ({"texts": "adaptive", "adaptive_step": 0.4, "rollout_batch": 12}, 8),
        ({"texts": "pairs", "rollout_batch": 7, "reuse": 2, "pack": True}, 7),
    ],
    ids=lambda value: str(value.get("texts")) if isinstance(value, dict) else None,
)
def test_loop_resumed_at_any_moment_continues_bit_for_bit(
    make_trainer, make_params, examples, packed, tmp_path, values, killed
):
    train_step, first = make_trainer(steps=12)
    mesh = make_mesh("data=1", jax.devices()[:1])
    common = {
        "steps": 12,
        "eval_every": 2,
        "save_every": killed,
        "pack": False,
        "seq_len": SEQ_LEN,
        "batch_size": BATCH,
        "completion_tokens": NEW,
        "buffer_capacity": 5 * BATCH,
    }
    chosen = from_dict(common | values, strict=False)
    data = packed if chosen.data.pack else examples

    class KilledError(Exception):
        pass

    def make(folder, *, stop=None, resume=False):
        def step_until(state, teacher, batch):
            if stop is not None and int(state.step) == stop:
                raise KilledError
            return train_step(state, teacher, batch)

        (tmp_path / folder).mkdir(exist_ok=True)
        loop = Loop(
            settings=chosen,
            folder=tmp_path / folder,
            train_step=step_until,
            teacher_params=make_params(2),
            batches=tx.OnPolicyBatches(
                chosen.on_policy,
                data,
                complete_by_weights,
                complete_beside=Writer(),
                ends=(END,),
                batch_size=BATCH,
                steps=12,
                seed=2,
            ),
            fingerprint="abc",
            # Never below the one before: the threshold rises every time.
            evaluate=lambda state: HeldOut(1.0, 2.0, 3.0, 4, loss=1.0),
            checkpoints=Checkpoints(tmp_path / folder / "checkpoints"),
            mesh=mesh,
            progress=Silent(),
        )
        state = jax.tree.map(jnp.array, first)
        if resume:
            step = loop.checkpoints.latest_step()
            state = loop.checkpoints.restore(state, step)
            place = read_run(loop.checkpoints.folder / str(step)).place
            loop.batches.set_state(place["iterator"])
            loop.evaluations = place["evaluations"]
        return loop, state

    whole, state = make("whole")
    expected = whole.run(state)
    cut, state = make("cut", stop=killed)
    with pytest.raises(KilledError):
        cut.run(state)
    cut.checkpoints.close()
    again, state = make("cut", resume=True)
    assert int(state.step) == killed
    found = again.run(state)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole.batches.get_state() == again.batches.get_state()
    rows = read_lines(whole.folder / "metrics.jsonl")
    counts = [row["completions"] for row in rows]
    assert sum(count > 0 for count in counts[killed:])
    ages = [row["completion_age"] for row in rows if row["completions"]]
    assert len(set(ages)) > 1


@pytest.fixture(params=["examples", "packed"])
def half_answered(request):
    """Of every second example the prompt alone is known."""
    data = request.getfixturevalue(request.param)
    cut = [
        each._replace(ids=each.ids[: each.prompt], counted=each.counted[: each.prompt])
        if number % 2
        else each
        for number, each in enumerate(data.table[n] for n in range(ROWS))
    ]
    return dataclasses.replace(data, table=make_table(enumerate(cut)))


@pytest.mark.parametrize("size", [BATCH, 2])
def test_pairs_are_both_texts_of_a_prompt_and_each_says_whose_it_is(
    make_batches, half_answered, size
):
    student, teacher = Writer(), Writer(length=4, end=True)
    batches = make_batches(
        settings("pairs"),
        student,
        complete_beside=teacher,
        data=half_answered,
        batch_size=size,
    )
    known = [half_answered.table[n] for n in range(ROWS)]
    found = []
    for step in range(1, 9):
        [batch] = take(batches, step)
        segments = batch["segment_ids" if half_answered.packed else "attention_mask"]
        assert batch["from_student"].dtype == np.int32
        assert not batch["from_student"][segments == 0].any()
        arrays = [batch[name] for name in ("input_ids", "labels", "from_student")]
        rows = zip(*arrays, segments, strict=True)
        texts = {0: [], 1: []}
        for ids, labels, own, segment in rows:
            for number in range(1, segment.max() + 1):
                (whose,) = set(own[segment == number].tolist())
                text = [row[segment == number].tolist() for row in (ids, labels)]
                texts[whose].append(text)
        assert float(batches.metrics()["completions"]) == len(texts[1])
        assert len(texts[0]) == len(texts[1]) > 0
        for said, _ in texts[1]:
            prompt = said[:-NEW]
            beside = [text for text in texts[0] if text[0][: len(prompt)] == prompt]
            assert beside
            found += [(prompt, *each) for each in beside]
    answered = {tuple(each.ids.tolist()) for each in known}
    open_ = 0
    for prompt, ids, labels in found:
        if tuple(ids) in answered:  # the data's answer, with what counts of it
            at = [tuple(each.ids.tolist()) for each in known].index(tuple(ids))
            assert labels == np.where(known[at].counted, ids, -100).tolist()
        else:
            open_ += 1
            assert len(ids) == len(prompt) + 4
            assert labels[-4:] == ids[-4:]
            assert ids[-1] == END
    assert 0 < open_ < len(found)
    # The teacher is asked what the student is, where the data have no answer.
    assert teacher.asked == [pair for pair in student.asked if pair[0] % 2]
    written = batches.summary(str)
    assert written["written"] == {"truncated": len(student.asked)}
    assert sum(written["trained_by_age"].values()) == len(found)


def test_adaptive_trains_on_new_ones_alone_then_on_the_buffer(make_batches):
    writer = Writer()
    chosen = settings("adaptive", buffer_capacity=2 * BATCH)
    batches = make_batches(chosen, writer, threshold=1.0, steps=10)
    first, second = ({*texts_of(batch)} for batch in take(batches, [1, 2]))
    assert len(first | second) == 2 * BATCH == len(writer.asked)
    # At the end of training a full buffer is all that is drawn from.
    [late] = take(batches, 11)
    assert {*texts_of(late)} <= first | second
    assert len(writer.asked) == 2 * BATCH


def test_threshold_follows_the_table_of_losses(make_batches):
    # Loss that is found -> the threshold after it, and the loss that is stored.
    table = [
        (math.nan, 0.0, None),
        (2.0, 0.0, 2.0),  # the first, before training, is stored
        (1.5, 0.0, 2.0),  # below: nothing changes, the stored one stays
        (1.9, 0.0, 2.0),  # above the last, but still below the stored one
        (2.0, 0.4, 2.0),  # equal counts as above
        (2.5, 0.8, 2.5),
        (2.4, 0.8, 2.5),
        (math.inf, 0.8, 2.5),
        (2.6, 1.0, 2.6),  # and at one it ends
    ]
    batches = make_batches(settings("adaptive", adaptive_step=0.4), Writer())
    batches.held_out_loss = None
    for found, value, stored in table:
        batches.observe(found)
        # Sums of 0.4 in float64.
        assert batches.threshold == pytest.approx(value, abs=1e-12)
        assert batches.held_out_loss == stored
