import dataclasses
import json

import pytest
from rich.console import Console

TINY = {"batch_size": 16, "seq_len": 32, "remat": "full"}


@pytest.fixture(scope="session")
def tiny():
    """Teacher and student of a few thousand parameters."""
    from taid_jax.models.config import DecoderConfig

    teacher = DecoderConfig(
        vocab_size=96,
        d_model=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_position_embeddings=64,
    )
    return teacher, dataclasses.replace(teacher, num_layers=2)


@pytest.fixture
def quiet():
    return Console(quiet=True)


@pytest.fixture(scope="session")
def make_settings():
    """Settings of a tiny run, and what is given."""
    from taid_jax.settings import from_dict

    return lambda **values: from_dict(TINY | values)


@pytest.fixture(scope="session")
def folder(tiny, tmp_path_factory):
    """A config.json of the tiny teacher, without weights."""
    from taid_jax.models.families import write_config

    folder = tmp_path_factory.mktemp("teacher")
    (folder / "config.json").write_text(json.dumps(write_config(tiny[0])))
    return folder


@pytest.fixture(scope="session")
def make_run(folder, make_settings):
    """Settings of a run of the tiny pair into a folder, and what is given."""

    def make(output, **values):
        pair = {"teacher": str(folder), "student_layers": 2, "output": str(output)}
        return make_settings(**pair, **values)

    return make


@pytest.fixture(scope="session")
def made(make_run, tmp_path_factory):
    """The plan of a tiny step on eight devices, with loops in loops, and its file."""
    from taid_jax.plan import make_plan
    from taid_jax.plan.report import FORMAT

    output = tmp_path_factory.mktemp("plan")
    (output / "plan.json").write_text(json.dumps({"format": FORMAT}))
    plan = make_plan(make_run(output, grad_accum=2), "local:8", Console(quiet=True))
    return plan, json.loads((output / "plan.json").read_text())


@pytest.fixture(scope="session")
def planned(made):
    return made[0]


@pytest.fixture(scope="session")
def cramped(tiny, make_settings):
    """The same batch in one piece, on devices with too little memory for it."""
    from taid_jax.plan import find_machine, plan_step

    machine = dataclasses.replace(find_machine("local:8"), hbm_bytes=1000)
    return plan_step(make_settings(), *tiny, machine)
