import jax
import pytest

from taid_jax.plan import Plan, advice, find_machine


def plan(*, fits):
    """A plan of which only that is asked."""
    sizes = dict.fromkeys(("chips", "hbm_limit_bytes", "argument_bytes"), 1)
    sizes |= dict.fromkeys(("flops_per_chip", "rematerializations"), 0)
    unknown = dict.fromkeys(("temp_bytes", "peak_bytes", "collectives"))
    empty = {name: {} for name in ("mesh", "seconds", "parts")}
    return Plan(
        machine="m", fits=fits, compile_seconds=0.0, **sizes, **unknown, **empty
    )


ALL_CHANGES = [
    {"mesh": "data=1,fsdp=8,tensor=1"},
    {"remat": "full"},
    {"grad_accum": 4},
    {"grad_accum": 16},
    {"seq_len": 1024},
    {"seq_len": 512},
    {"seq_len": 256},
]


@pytest.mark.parametrize(
    ("given", "tried"),
    [
        ({"texts": "student", "completion_tokens": 600}, [{"seq_len": 1024}]),
        (
            {"teacher_prompt": "hint", "teacher_seq_len": 3072},
            [
                {"seq_len": length, "teacher_seq_len": 3 * length // 2}
                for length in (1024, 512, 256)
            ],
        ),
    ],
)
def test_find_fit_of_shorter_rows_is_what_the_settings_allow(
    make_settings, tiny, monkeypatch, given, tried
):
    monkeypatch.setattr(advice, "plan_step", lambda *_: plan(fits=False))
    settings = make_settings(batch_size=1, seq_len=2048, remat="full", **given)
    jax.devices()  # Once counted they are what they are.
    found = advice.find_fit(settings, *tiny, find_machine("local:1"))
    assert [attempt.flags for attempt in found] == tried


@pytest.mark.parametrize("fitting", [1, 2, 4, 6, None])
def test_find_fit_adds_changes_until_it_fits(make_settings, tiny, monkeypatch, fitting):
    steps = []

    def plan_step(settings, *_):
        steps.append(settings)
        return plan(fits=len(steps) == fitting)

    monkeypatch.setattr(advice, "plan_step", plan_step)
    settings = make_settings(batch_size=128, seq_len=2048, mesh="data=8", remat="none")
    seen = []
    attempts = advice.find_fit(
        settings, *tiny, find_machine("local:8"), compiled=seen.append
    )
    expected = [{}]
    for change in ALL_CHANGES[:fitting]:
        expected.append(expected[-1] | change)
    assert [attempt.flags for attempt in attempts] == expected[1:]
    assert seen == attempts
    last = expected[-1]
    assert steps[-1].run.mesh == last["mesh"]
    assert steps[-1].optimizer.grad_accum == last.get("grad_accum", 1)
    assert steps[-1].data.seq_len == last.get("seq_len", 2048)
