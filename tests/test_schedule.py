"""How t moves."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taid_jax.schedule import ScheduledT, TAIDScheduler, TAIDState

GOLDEN = pathlib.Path(__file__).parents[1] / "parity" / "golden"
HISTORIES = ("default", "stablelm_like", "fast", "linear", "short_end", "spiky")


def history(scheduler, losses, steps=None) -> TAIDState:
    """The state after every step, stacked."""
    losses = jnp.asarray(losses, jnp.float32)
    steps = jnp.arange(len(losses)) if steps is None else jnp.asarray(steps)

    def step(state, inputs):
        state = scheduler.update(state, *inputs)
        return state, state

    return jax.jit(lambda: jax.lax.scan(step, scheduler.init(), (losses, steps))[1])()


@pytest.mark.parametrize("name", HISTORIES)
def test_update_follows_the_recorded_histories(name):
    with np.load(GOLDEN / "schedule.npz") as golden:
        scheduler = TAIDScheduler(**json.loads(str(golden[f"{name}/config"])))
        losses = golden[f"{name}/losses"]
        states = history(scheduler, losses)
        # Two units of float32's last place at 1, over up to 2000 steps.
        np.testing.assert_allclose(states.t, golden[f"{name}/t"], atol=1.2e-7)
        np.testing.assert_allclose(
            states.momentum, golden[f"{name}/momentum"], atol=1e-7
        )
        np.testing.assert_array_equal(states.prev_loss, golden[f"{name}/prev_loss"])
        delta = golden[f"{name}/delta_t"][1:]
    adaptive = (states.t[:-1] + delta) < 1
    if name == "fast":  # where every step is adaptive, the steps of t are delta_t
        np.testing.assert_allclose(
            np.diff(states.t)[adaptive], delta[adaptive], atol=1.2e-7
        )


def test_update_counts_steps_as_the_recorded_run_did():
    """`t_used` of a step is `t_after` of the one before; the index is from 0."""
    with np.load(GOLDEN / "run_taid" / "run.npz") as run:
        settings = json.loads((GOLDEN / "run_taid" / "run.json").read_text())
        scheduler = TAIDScheduler(
            settings["steps"],
            t_start=settings["t_start"],
            alpha=settings["alpha"],
            beta=settings["beta"],
        )
        states = history(scheduler, run["loss"])
        used = np.concatenate([[scheduler.init().t], states.t[:-1]])
        np.testing.assert_allclose(states.t, run["t_after"], atol=1.2e-7)
        np.testing.assert_allclose(used, run["t_used"], atol=1.2e-7)


def test_init_starts_at_t_start_with_float32_scalars():
    state = TAIDScheduler(10, t_start=0.25).init()
    assert state.t == 0.25
    for leaf in jax.tree.leaves(state):
        assert leaf.shape == ()
        assert leaf.dtype == jnp.float32


def test_first_update_only_stores_the_loss():
    scheduler = TAIDScheduler(10, alpha=0.5)
    first = scheduler.update(scheduler.init(), 3.0, 0)
    assert (first.t, first.prev_loss, first.momentum) == (jnp.float32(0.4), 3, 0)
    second = scheduler.update(first, 2.0, 1)
    assert second.t > first.t
    np.testing.assert_allclose(second.momentum, 0.01 / 3, rtol=1e-5)


def test_update_is_the_same_eager_jitted_and_scanned():
    rng = np.random.default_rng(0)
    losses = (3 + rng.random(20)).astype(np.float32)
    scheduler = TAIDScheduler(40, t_start=0.2, alpha=0.1, beta=0.5)
    scanned = history(scheduler, losses)
    update = jax.jit(scheduler.update)
    eager = jitted = scheduler.init()
    for i, loss in enumerate(losses):
        eager = scheduler.update(eager, jnp.float32(loss), i)
        jitted = update(jitted, jnp.float32(loss), i)
        for name in TAIDState._fields:
            # A fused multiply-add here and there.
            expected = getattr(scanned, name)[i]
            np.testing.assert_allclose(getattr(eager, name), expected, rtol=1e-6)
            np.testing.assert_allclose(getattr(jitted, name), expected, rtol=1e-6)


def test_update_under_vmap_is_one_history_at_a_time():
    rng = np.random.default_rng(1)
    losses = jnp.asarray(rng.random((3, 15)) + 1, jnp.float32)
    scheduler = TAIDScheduler(30, t_start=0.1, alpha=0.2, beta=0.3)
    steps = jnp.arange(15)

    def run(losses):
        def step(state, inputs):
            state = scheduler.update(state, *inputs)
            return state, state

        return jax.lax.scan(step, scheduler.init(), (losses, steps))[1]

    together = jax.vmap(run)(losses)
    for i in range(3):
        alone = history(scheduler, losses[i])
        np.testing.assert_allclose(together.t[i], alone.t, rtol=1e-6)


@pytest.mark.multidevice
def test_update_runs_under_shard_map():
    scheduler = TAIDScheduler(10)
    mesh = jax.make_mesh((8,), ("data",))

    def update(losses):
        mean = jax.lax.pmean(losses[0], "data")
        state = scheduler.update(scheduler.init(), mean, 0)
        return scheduler.update(state, mean - 1, 1)

    spec = jax.sharding.PartitionSpec
    sharded = jax.jit(
        jax.shard_map(update, mesh=mesh, in_specs=spec("data"), out_specs=spec())
    )
    losses = jax.sharding.NamedSharding(mesh, spec("data"))
    state = sharded(jax.device_put(jnp.arange(8.0) + 1, losses))
    expected = scheduler.update(scheduler.init(), 4.5, 0)
    expected = scheduler.update(expected, 3.5, 1)
    np.testing.assert_allclose(state.t, expected.t, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("disable_adaptive", [False, True])
def test_a_loss_that_is_not_finite_leaves_the_state(bad, disable_adaptive):
    scheduler = TAIDScheduler(10, alpha=0.1, disable_adaptive=disable_adaptive)
    state = scheduler.init()
    # Also as the very first loss.
    for i, loss in enumerate((bad, 3.0, bad, 2.5, bad)):
        after = scheduler.update(state, loss, i)
        if not np.isfinite(loss):
            assert after == state
        state = after
    clean = scheduler.init()
    for i, loss in ((1, 3.0), (3, 2.5)):
        clean = scheduler.update(clean, loss, i)
    assert state == clean
    assert all(np.isfinite(leaf) for leaf in state)


def test_t_never_falls_and_never_passes_its_end():
    rng = np.random.default_rng(2)
    losses = np.exp(rng.standard_normal(300) * 3)
    losses[10:13] = 0.0  # One of 0 is safe, and the next beside it.
    # Steps counted anew, and far beyond the end.
    steps = np.concatenate([np.arange(100), np.arange(100), np.arange(100) * 50])
    for settings in (
        {"alpha": 0.05},
        {"alpha": 0.0},
        {"t_start": 0.3, "t_end": 0.8, "alpha": 1.0, "beta": 0.0},
        {"disable_adaptive": True},
    ):
        scheduler = TAIDScheduler(200, **settings)
        states = history(scheduler, losses, steps)
        assert all(np.isfinite(leaf).all() for leaf in states)
        t = np.asarray(states.t)
        assert (np.diff(t) >= 0).all()
        assert t[0] == np.float32(scheduler.t_start)
        assert t[-1] == np.float32(scheduler.t_end)
        assert t.max() <= np.float32(scheduler.t_end)


def test_disable_adaptive_follows_the_line():
    scheduler = TAIDScheduler(
        10, t_start=0.2, t_end=0.7, alpha=0.9, disable_adaptive=True
    )
    t = history(scheduler, np.linspace(9, 1, 14)).t
    expected = 0.2 + 0.5 * np.minimum(np.arange(14) / 10, 1)
    np.testing.assert_allclose(t, expected, rtol=1e-6)


def test_a_falling_loss_moves_t_ahead_of_a_rising_one():
    scheduler = TAIDScheduler(1000, alpha=0.1, beta=0.5)
    falling = history(scheduler, np.linspace(9, 1, 30)).t
    rising = history(scheduler, np.linspace(1, 9, 30)).t
    assert falling[-1] > rising[-1]


def test_scheduled_t_takes_an_optax_schedule():
    schedule = optax.linear_schedule(0.2, 1.4, 10)
    driver = ScheduledT(schedule)
    state = driver.init()
    used = []
    update = jax.jit(driver.update)
    for i in range(12):
        used.append(float(state.t))
        state = update(state, jnp.float32(3.0), i)
    # The step of index k runs with the schedule's value at k, cut off at 1.
    expected = np.minimum([float(schedule(i)) for i in range(12)], 1)
    np.testing.assert_allclose(used, expected, rtol=1e-6)
    assert state.prev_loss == 3


def test_scheduled_t_keeps_its_state_without_a_finite_loss():
    driver = ScheduledT(lambda step: 0.1 * step)
    state = driver.update(driver.init(), 2.0, 0)
    assert driver.update(state, jnp.nan, 1) == state
    assert jax.tree.structure(state) == jax.tree.structure(TAIDScheduler(5).init())


@pytest.mark.parametrize(("loss", "step"), [(1.0, np.nan), (np.nan, 3), (-3e38, 3)])
@pytest.mark.parametrize("disable_adaptive", [False, True])
def test_update_by_what_is_not_finite_leaves_the_state(loss, step, disable_adaptive):
    """The last loss makes a momentum that float32 does not hold."""
    scheduler = TAIDScheduler(10, disable_adaptive=disable_adaptive)
    state = scheduler.init()._replace(prev_loss=jnp.float32(3e38), t=jnp.float32(0.5))
    found = scheduler.update(state, jnp.float32(loss), jnp.float32(step))
    np.testing.assert_array_equal(found, state)


def test_scheduled_t_keeps_the_last_one_where_the_schedule_is_nan():
    scheduler = ScheduledT(lambda step: jnp.where(step == 2, jnp.nan, step / 10))
    state = scheduler.init()
    ts = []
    for step in range(3):
        state = scheduler.update(state, jnp.float32(1), jnp.int32(step))
        ts.append(float(state.t))
    np.testing.assert_allclose(ts, [0.1, 0.1, 0.3], rtol=1e-6)  # float32
