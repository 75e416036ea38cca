import dataclasses
import json
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.data.batches import ExampleSet, train_iterator
from taid_jax.data.packing import make_table
from taid_jax.data.tokens import Example
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import (
    abstract_params,
    init_params,
    param_axes,
)
from taid_jax.models.generation import generate, prepare
from taid_jax.models.sampling import GREEDY, SamplingParams
from taid_jax.settings import OnPolicySettings, SettingsError, from_dict
from taid_jax.sharding import make_mesh, tree_shardings
from taid_jax.train.checkpoint import Checkpoints, read_run
from taid_jax.train.evaluate import HeldOut
from taid_jax.train.loop import Loop
from taid_jax.train.on_policy import buffer as bf
from taid_jax.train.on_policy.generation import make_complete
from taid_jax.train.report import read_lines

SEQ_LEN, NEW, BATCH, END = 16, 6, 8, 3
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
    for number in range(40):
        length = int(rng.integers(6, SEQ_LEN + 1))
        prompt = int(rng.integers(2, length))
        if number % 8 == 3:
            length, prompt = 15, 12
        ids = rng.integers(4, CONFIG.vocab_size, length).astype(np.int32)
        counted = np.arange(length) >= prompt
        counted[2] = True  # an earlier answer
        pairs.append((number, Example(ids, counted, prompt, length)))
    return ExampleSet(
        make_table(pairs), [(n,) for n in range(40)], SEQ_LEN, pad_id=0, packed=False
    )


def settings(sampler, **values):
    return OnPolicySettings(sampler, completion_tokens=NEW, **values)


def complete_on(mesh, params, sampling=GREEDY):
    shapes = abstract_params(CONFIG)
    shardings = tree_shardings(param_axes(CONFIG), shapes, mesh)
    complete = make_complete(
        CONFIG,
        mesh,
        shardings=shardings,
        ends=(END,),
        max_new_tokens=NEW,
        dtype=jnp.float32,
        sampling=sampling,
        seed=1,
    )
    return complete, jax.device_put(params, shardings)


@pytest.fixture(scope="module")
def greedy(params):
    """The student's greedy completions on one device."""
    mesh = make_mesh("data=1", jax.devices()[:1])
    return complete_on(mesh, params)[0]


@pytest.fixture
def make_batches(examples, greedy):
    def make(chosen, *, complete=greedy, threshold=0.0, **options):
        options = {"batch_size": BATCH, "steps": 100, "seed": 5} | options
        batches = bf.OnPolicyBatches(chosen, examples, complete, **options)
        batches.threshold, batches.held_out_loss = threshold, 1.0
        return batches

    return make


def rows_of_data(examples, count=BATCH):
    numbers = range(count)
    return examples.batch(numbers, count) | examples.prompts(numbers, count)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_batches_puts_the_students_completions_behind_the_prompts(
    make_batches, examples, params
):
    data = rows_of_data(examples)
    batches = make_batches(settings("adaptive", buffer_capacity=20), threshold=1.0)
    found = batches.batch(data, params, 1)
    assert found.keys() == {"input_ids", "labels", "attention_mask"}
    width = SEQ_LEN - NEW
    padded, real = np.zeros((2, BATCH, width), np.int32)
    for row, prompt in enumerate(data["prompt_lengths"]):
        used = min(prompt, width)
        padded[row, width - used :] = data["input_ids"][row, :used]
        real[row, width - used :] = 1
    answers = generate(
        prepare(params, CONFIG, unroll=False),
        CONFIG,
        jnp.asarray(padded),
        jnp.asarray(real),
        max_new_tokens=NEW,
        eos_token_ids=(END,),
        pad_token_id=-1,
    ).tokens
    answers = np.asarray(answers)
    kept = 0
    for row in range(BATCH):
        prompt = int(data["prompt_lengths"][row])
        ids = data["input_ids"][row]
        if prompt > width:
            kept += 1
            for name, array in found.items():
                np.testing.assert_array_equal(array[row], data[name][row])
            continue
        new = [token for token in answers[row].tolist() if token >= 0]
        whole = ids[:prompt].tolist() + new
        rest = SEQ_LEN - len(whole)
        assert found["input_ids"][row].tolist() == whole + [0] * rest
        labels = data["labels"][row, :prompt].tolist() + new + [-100] * rest
        assert found["labels"][row].tolist() == labels
        assert labels[2] == (ids[2] if prompt > 2 else new[2 - prompt])
        mask = [1] * len(whole) + [0] * rest
        assert found["attention_mask"][row].tolist() == mask
    assert 0 < kept < BATCH / 2
    assert len(batches.buffer) == BATCH


def test_batches_gives_the_data_where_the_rules_say_so(make_batches, examples, params):
    batches = make_batches(settings("adaptive", buffer_capacity=20), threshold=0.0)
    data = rows_of_data(examples)
    found = batches.batch(data, params, 1)
    del data["prompt_lengths"], data["answer_ends"]
    assert_equal(found, data)
    assert len(batches.buffer) == 0
    assert float(batches.metrics()["on_policy"]) == 0


def test_batches_mixed_trains_on_a_draw_from_the_buffer(make_batches, examples, params):
    batches = make_batches(settings("mixed", mixed_rate=1.0, buffer_capacity=20))
    batches.batch(rows_of_data(examples), params, 1)
    first = {tuple(example.ids.tolist()) for example in batches.buffer}
    numbers = range(BATCH, 2 * BATCH)
    data = examples.batch(numbers, BATCH) | examples.prompts(numbers, BATCH)
    found = batches.batch(data, params, 2)
    everything = {tuple(example.ids.tolist()) for example in batches.buffer}
    assert len(batches.buffer) == 2 * BATCH
    lengths = found["attention_mask"].sum(axis=1)
    drawn = {
        tuple(row[:length].tolist())
        for row, length in zip(found["input_ids"], lengths, strict=True)
    }
    assert drawn <= everything
    assert drawn & first
    assert drawn - first


def test_batches_draws_by_seed_and_step_alone(make_batches, examples, params):
    chosen = settings("mixed", buffer_capacity=20)
    data = rows_of_data(examples)
    plans = []
    for seed in (5, 5, 6):
        batches = make_batches(chosen, seed=seed)
        for step in range(1, 21):
            batches.batch(data, params, step)
            plans.append(batches.plan.generate)
    first, again, other = plans[:20], plans[20:40], plans[40:]
    assert first == again
    assert first != other
    assert 3 < sum(first) < 17


def test_batches_of_two_processes_gives_the_batch_of_one(
    make_batches, examples, params, greedy
):
    chosen = settings("mixed", mixed_rate=1.0, buffer_capacity=20)
    data = rows_of_data(examples)
    whole = make_batches(chosen).batch(data, params, 1)

    def gathered(params, rows, step):
        """Stands for the exchange between processes: both get all rows."""
        return greedy(params, every, step)

    # The rows of both, as one process has them.
    every = bf.prompt_rows(
        {name: data[name] for name in ("input_ids", "labels", "attention_mask")},
        data["prompt_lengths"],
        SEQ_LEN - NEW,
        SEQ_LEN,
    )
    parts = []
    for index in range(2):
        own = {name: np.split(array, 2)[index] for name, array in data.items()}
        batches = make_batches(
            chosen, complete=gathered, process_index=index, process_count=2
        )
        parts.append(batches.batch(own, params, 1))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    assert_equal(joined, whole)


@pytest.mark.multidevice
def test_batches_completions_the_same_on_eight_devices(make_batches, examples, params):
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    chosen = settings("adaptive", buffer_capacity=20, completion_temperature=1.0)
    single = make_mesh("data=1", jax.devices()[:1])
    found = []
    for place in (single, mesh):
        complete, placed = complete_on(place, params, SamplingParams(1.0))
        batches = make_batches(chosen, complete=complete, threshold=1.0)
        found.append(batches.batch(rows_of_data(examples), placed, 3))
    assert_equal(*found)
    greedy = make_batches(settings("adaptive"), threshold=1.0)
    greedy = greedy.batch(rows_of_data(examples), params, 3)
    assert (greedy["input_ids"] != found[0]["input_ids"]).any()


def test_batches_takes_batches_of_several_lengths(examples, params, greedy):
    bucketed = dataclasses.replace(examples, buckets=(12, SEQ_LEN))
    batches = bf.OnPolicyBatches(
        settings("adaptive", buffer_capacity=20),
        bucketed,
        greedy,
        batch_size=4,
        steps=10,
        seed=0,
    )
    batches.threshold = 1.0
    prompts, lengths = examples.table.prompts, examples.table.lengths
    short = [n for n in range(40) if prompts[n] <= 6 and lengths[n] <= 12][:3]
    assert len(short) == 3
    numbers = [*short, -1]  # and a row that is empty
    size = len(numbers)
    data = bucketed.batch(numbers, size, 12) | bucketed.prompts(numbers, size)
    found = batches.batch(data, params, 1)
    assert found["input_ids"].shape == (4, 12)
    assert len(batches.buffer) == len(short)
    assert found["attention_mask"].sum(axis=1)[-1] == 0


def test_batches_without_a_prompt_that_has_room_says_so(make_batches, examples, params):
    batches = make_batches(settings("mixed", mixed_rate=1.0))
    data = rows_of_data(examples) | {"prompt_lengths": np.full(BATCH, 15, np.int32)}
    step = 1
    while step * BATCH < bf._PATIENCE:
        batches.batch(data, params, step)
        step += 1
    with pytest.raises(SettingsError, match=r"completion_tokens: of .* rows none"):
        batches.batch(data, params, step)


class Silent:
    def step(self, row): ...

    def evaluation(self, row): ...

    def say(self, text): ...


def complete_by_weights(params, rows, step):
    """Stands for generation: other weights, other completions."""
    weights = np.asarray(params["mix"]["kernel"]).tobytes()
    rng = np.random.default_rng((zlib.crc32(weights), step))
    count = len(rows["input_ids"])
    tokens = rng.integers(4, CONFIG.vocab_size, (count, NEW)).astype(np.int32)
    return rows | {"tokens": tokens, "lengths": np.full(count, NEW, np.int32)}


def test_loop_resumed_in_the_middle_of_a_buffer_continues_bit_for_bit(
    make_trainer, make_params, examples, tmp_path
):
    train_step, first = make_trainer(steps=12)
    mesh = make_mesh("data=1", jax.devices()[:1])
    values = {
        "steps": 12,
        "eval_every": 2,
        "save_every": 3,
        "pack": False,
        "seq_len": SEQ_LEN,
        "batch_size": BATCH,
        "on_policy": "adaptive",
        "completion_tokens": NEW,
        "buffer_capacity": 3 * BATCH,
        "adaptive_step": 0.4,
    }
    chosen = from_dict(values, strict=False)

    class KilledError(Exception):
        pass

    def make(folder, *, killed=False, resume=False):
        evaluations = []

        def evaluate(state):
            evaluations.append(int(state.step))
            if killed and evaluations[-1] == 8:
                raise KilledError
            # Never below the one before: the threshold rises every time.
            return HeldOut(1.0, 2.0, 3.0, 4, loss=1.0)

        (tmp_path / folder).mkdir(exist_ok=True)
        loop = Loop(
            settings=chosen,
            folder=tmp_path / folder,
            train_step=train_step,
            teacher_params=make_params(2),
            batches=train_iterator(
                examples, BATCH, seed=0, prefetch=0, with_prompts=True
            ),
            fingerprint="abc",
            evaluate=evaluate,
            checkpoints=Checkpoints(tmp_path / folder / "checkpoints"),
            mesh=mesh,
            progress=Silent(),
            on_policy=bf.OnPolicyBatches(
                chosen.on_policy,
                examples,
                complete_by_weights,
                batch_size=BATCH,
                steps=12,
                seed=2,
            ),
        )
        state = jax.tree.map(jnp.array, first)
        if resume:
            step = loop.checkpoints.latest_step()
            state = loop.checkpoints.restore(state, step)
            place = read_run(loop.checkpoints.folder / str(step)).place
            loop.batches.set_state(place["iterator"])
            loop.evaluations = place["evaluations"]
            loop.on_policy.set_state(place["on_policy"])
        return loop, state

    whole, state = make("whole")
    expected = whole.run(state)
    cut, state = make("cut", killed=True)
    with pytest.raises(KilledError):
        cut.run(state)
    cut.checkpoints.close()
    again, state = make("cut", resume=True)
    assert int(state.step) == 6
    assert len(again.on_policy.buffer) > 0
    found = again.run(state)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole.on_policy.get_state() == again.on_policy.get_state()
    rows = read_lines(whole.folder / "metrics.jsonl")
    kinds = [row["on_policy"] for row in rows]
    assert 0 < sum(kinds[6:]) <= sum(kinds) < 12


def plan(sampler, draw, threshold=0.0, progress=0.0, full=False):
    chosen = settings(sampler, mixed_rate=0.5)
    found = bf.plan_step(
        chosen, draw, threshold=threshold, progress=progress, full=full
    )
    return {
        (False, "data"): "data",
        (True, "new"): "new",
        (False, "buffer"): "old",
        (True, "buffer"): "new and old",
    }[found]


def test_plan_step_is_the_table_of_gkd():
    found = [plan("mixed", draw) for draw in (0.0, 0.49, 0.5, 0.51)]
    assert found == ["new and old"] * 2 + ["data"] * 2


# Threshold a, progress p, draw r, and what is done when the buffer is full or is not.
# New completions below a (1 - p); up to a from the buffer, or new when it is not full;
# the data from a on.
DISTILLM = [
    (0.0, 0.0, 0.0, "data", "data"),
    (0.1, 0.0, 0.05, "new", "new"),
    (0.1, 0.0, 0.1, "data", "data"),
    (0.4, 0.5, 0.19, "new", "new"),
    (0.4, 0.5, 0.2, "old", "new"),
    (0.4, 0.5, 0.39, "old", "new"),
    (0.4, 0.5, 0.4, "data", "data"),
    (1.0, 0.25, 0.74, "new", "new"),
    (1.0, 0.25, 0.75, "old", "new"),
    (1.0, 1.0, 0.0, "old", "new"),
]


def test_plan_step_is_the_table_of_distillm():
    for threshold, progress, draw, full, part in DISTILLM:
        for wanted, is_full in ((full, True), (part, False)):
            found = plan("adaptive", draw, threshold, progress, is_full)
            assert found == wanted, (threshold, progress, draw, is_full)


def test_threshold_follows_the_table_of_losses(examples, greedy):
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
    options = {"batch_size": BATCH, "steps": 100, "seed": 5}
    chosen = settings("adaptive", adaptive_step=0.4)
    batches = bf.OnPolicyBatches(chosen, examples, greedy, **options)
    for found, value, stored in table:
        batches.observe(found)
        # Sums of 0.4 in float64.
        assert batches.threshold == pytest.approx(value, abs=1e-12)
        assert batches.held_out_loss == stored


def example(number):
    ids = np.arange(number, number + 2 + number % 5, dtype=np.int32)
    return Example(ids, ids % 3 == 0)


def contents(buffer):
    return [(e.ids.tolist(), e.counted.tolist()) for e in buffer]


def test_buffer_draws_different_ones_by_the_generator():
    buffer = bf.ReplayBuffer(50)
    buffer.add(example(n) for n in range(50))
    first = [e.ids[0] for e in buffer.draw(np.random.default_rng(3), 20)]
    again = [e.ids[0] for e in buffer.draw(np.random.default_rng(3), 20)]
    assert len(set(first)) == 20
    assert first == again
    assert first != [e.ids[0] for e in buffer.draw(np.random.default_rng(4), 20)]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_buffer_state_goes_through_json_whole(count):
    buffer = bf.ReplayBuffer(5)
    buffer.add(example(n) for n in range(count))
    assert [ids[0] for ids, _ in contents(buffer)] == list(range(count))[-5:]
    again = bf.ReplayBuffer(5)
    again.add([example(99)])
    again.set_state(json.loads(json.dumps(buffer.get_state())))
    assert contents(again) == contents(buffer)
    assert again.full == buffer.full == (count >= 5)
    for e in again:
        assert e.ids.dtype == np.int32
        assert e.counted.dtype == np.bool_
