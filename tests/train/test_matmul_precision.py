import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from taid_jax.settings import Settings, from_dict


class ReachedError(Exception):
    """Where a test stops a command."""


def distil(settings: Settings):
    from taid_jax.train.run import distil

    distil(settings, Console(quiet=True))


def store(settings: Settings):
    from taid_jax.store.options import StoreOptions
    from taid_jax.store.write import store_teacher

    store_teacher(settings, StoreOptions(), Console(quiet=True))


def evaluate(settings: Settings):
    from taid_jax.cli.evaluate import score

    score(settings)


def generate(settings: Settings):
    from taid_jax.cli.generate import main

    precision = settings.model.matmul_precision
    main(["--prompts=p", "--output=o", f"--matmul-precision={precision}"])


def plan(settings: Settings):
    from taid_jax.models.presets import preset
    from taid_jax.plan import find_machine, plan_step

    plan_step(settings, *[preset("gpt2")] * 2, find_machine("local:1"))


@pytest.mark.parametrize(
    ("command", "inside"),
    [
        (distil, "taid_jax.distributed.agree_on_settings"),
        (store, "taid_jax.distributed.agree_on_settings"),
        (evaluate, "taid_jax.sharding.make_mesh"),
        (generate, "taid_jax.cli.generate.write_answers"),
        (plan, "taid_jax.train.step.batch_loss"),
    ],
)
def test_matmul_precision_holds_within_each_command(
    command, inside, monkeypatch, tmp_path
):
    found = []

    def reach(*_, **__):
        x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
        found.append(jax.jit(jnp.dot).lower(x, x).as_text())
        raise ReachedError

    monkeypatch.setattr(inside, reach)
    with pytest.raises(ReachedError):
        command(from_dict({"matmul_precision": "highest", "output": str(tmp_path)}))
    assert "precision = [HIGHEST, HIGHEST]" in found[0]
    # And not after it.
    assert jax.config.jax_default_matmul_precision is None
