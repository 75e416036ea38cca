import pytest

from taid_jax import settings as s

GOOD = {
    "sampler": "mixed",
    "pack": False,
    "seq_len": 64,
    "sample_tokens": 32,
    "batch_size": 8,
    "buffer_capacity": 8,
}


def test_sample_settings_default_is_no_sampler_and_asks_nothing_of_the_data():
    found = s.from_dict({"pack": True, "seq_len": 16, "batch_size": 2000})
    assert found.samples.sampler == "none"


def test_sample_settings_good_ones_are_taken():
    assert s.from_dict(GOOD).samples.sample_tokens == 32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pack": True}, "--no-pack"),
        ({"sample_tokens": 64}, "sample_tokens: need fewer than seq_len, which is 64"),
        ({"buffer_capacity": 7}, "buffer_capacity: need at least batch_size"),
        ({"mixed_rate": 1.5}, "mixed_rate: need 0 <= mixed_rate <= 1"),
        ({"adaptive_step": -0.1}, "adaptive_step: need 0 <= adaptive_step"),
        ({"sampler": "gkd"}, "sampler: need"),
        ({"sample_top_k": 5}, "sample_temperature: need > 0 where top_k"),
        ({"sample_top_p": 0.0, "sample_temperature": 1.0}, "sample_top_p: need 0 <"),
    ],
)
def test_sample_settings_bad_ones_say_what_was_needed(values, message):
    with pytest.raises(s.SettingsError) as caught:
        s.from_dict(GOOD | values)
    assert message in str(caught.value)


def test_contradictions_name_the_evaluations_that_move_the_adaptive_threshold():
    for sampler, expected in (("mixed", []), ("adaptive", ["run.eval_every"])):
        saved = s.from_dict(GOOD | {"sampler": sampler})
        asked = s.from_dict({"eval_every": 3, "save_every": 2}, saved)
        found = s.contradictions(saved, asked)
        assert [line.split(":")[0] for line in found] == expected
