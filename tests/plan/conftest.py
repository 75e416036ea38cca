import dataclasses
import json

import pytest
from rich.console import Console

TINY = {"batch_size": 8, "seq_len": 32, "remat": "full"}


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
def planned(tiny, make_settings):
    """The plan of a tiny step on eight devices, with loops in loops."""
    from taid_jax.plan import find_machine, plan_step

    settings = make_settings(grad_accum=2, batch_size=16)
    return plan_step(settings, *tiny, find_machine("local:8"))


@pytest.fixture(scope="session")
def cramped(tiny, make_settings):
    """The same batch in one piece, on devices with too little memory for it."""
    from taid_jax.plan import find_machine, plan_step

    machine = dataclasses.replace(find_machine("local:8"), hbm_bytes=1000)
    return plan_step(make_settings(grad_accum=1, batch_size=16), *tiny, machine)


@pytest.fixture
def folder(tiny, tmp_path):
    """A config.json of the tiny teacher, without weights."""
    from taid_jax.models.families import write_config

    (tmp_path / "teacher").mkdir()
    config = json.dumps(write_config(tiny[0]))
    (tmp_path / "teacher" / "config.json").write_text(config)
    return tmp_path / "teacher"
