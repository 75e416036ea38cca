"""Sizes of the fused head's loop: they nest, and hold what they are meant to."""

import pytest

from taid_jax.loss._fused.plan import Plan, make_plan

VOCABS = [17, 1000, 32000, 49152, 128256, 3_000_000]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 100, 4096])
def test_make_plan_sizes_nest_and_cover_the_chunk(platform, vocab, chunk_size):
    for tokens in (1, 2, 3, 9, 127, 128, 129, 1000, 8192):
        plan = make_plan(tokens, vocab, platform, chunk_size)

        assert plan.groups >= 1
        assert plan.rows % plan.groups == 0
        assert plan.block % plan.rows == 0
        assert plan.chunk % plan.block == 0
        assert plan.cpu == (platform == "cpu")
        if chunk_size is not None:
            assert plan.chunk >= min(tokens, chunk_size) / 2
            # Rounded up to whole rows, hence at most doubled.
            assert plan.chunk <= 2 * max(chunk_size, 2)


@pytest.mark.parametrize(
    ("tokens", "vocab", "expected"),
    [
        (1024, 49152, Plan(2, 8, 256, 512, cpu=True)),
        (2048, 32000, Plan(2, 16, 256, 1024, cpu=True)),
        (16, 1000, Plan(1, 16, 16, 16, cpu=True)),
    ],
)
def test_make_plan_on_a_cpu_takes_two_groups_where_a_chunk_has_several_steps(
    tokens, vocab, expected
):
    assert make_plan(tokens, vocab, "cpu", None) == expected


def test_make_plan_on_an_accelerator_takes_one_group():
    assert make_plan(8192, 128256, "tpu", None).groups == 1
    assert make_plan(8192, 128256, "gpu", None).groups == 1
