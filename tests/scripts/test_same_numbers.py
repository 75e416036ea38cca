"""The same run on other meshes, with accumulation: the same numbers at every step."""

import jax
import numpy as np
import pytest

STEPS = 60
MESHES = {
    "data=1": 1,
    "data=8": 8,
    "fsdp=8": 8,
    "data=2,tensor=4": 8,
    "data=2,fsdp=2,tensor=2": 8,
}
# Every mesh and every accumulation; all fifteen pairs pass too, in three minutes.
CASES = (
    ("data=1", 4),
    ("data=8", 1),
    ("fsdp=8", 2),
    ("data=2,tensor=4", 4),
    ("data=2,fsdp=2,tensor=2", 2),
)


@pytest.fixture(scope="module")
def twin(make_model):
    """A small teacher of the default job's family, whose axes eight devices share."""
    return make_model(
        layers=4, d_model=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64
    )


@pytest.fixture
def curve(twin, text, tmp_path):
    """A function: loss, KL, t and gradient norm of every step of a run."""
    from taid_jax.settings import from_dict
    from taid_jax.sharding import make_mesh, place_batch
    from taid_jax.train.build import build_loop
    from taid_jax.train.checkpoint import Checkpoints
    from taid_jax.train.evaluate import make_evaluator
    from taid_jax.train.inputs import check_models, read_data
    from taid_jax.train.pair import load_pair

    def run(mesh_text, parts):
        settings = from_dict(
            {
                "teacher": str(twin),
                "student_layers": 2,
                "data": str(text),
                "output": str(tmp_path),
                "steps": STEPS,
                "batch_size": 32,
                "seq_len": 16,
                "held_out_fraction": 0.3,
                "learning_rate": 1e-3,
                "grad_accum": parts,
                "alpha": 5e-3,
            }
        )
        mesh = make_mesh(mesh_text, jax.devices()[: MESHES[mesh_text]])
        tokenizer = check_models(settings.model, settings.data.seq_len).tokenizer
        dataset = read_data(settings, tokenizer)
        pair = load_pair(settings, mesh)
        evaluator = make_evaluator(settings, pair, dataset, mesh, tokenizer=tokenizer)
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        loop, state = build_loop(
            settings, tmp_path, pair, dataset, checkpoints, mesh, evaluator, tokenizer
        )
        rows = []
        for _ in range(STEPS):
            batch = place_batch(next(loop.batches), mesh)
            state, metrics = loop.train_step(state, loop.teacher_params, batch)
            keys = "loss", "kl_teacher", "t", "grad_norm"
            # Read at once, as the loop does: many programs on their way to eight
            # devices can keep each other from their threads, which ends the process.
            rows.append(jax.device_get([metrics[key] for key in keys]))
        checkpoints.close()
        return np.array(rows)

    return run


@pytest.mark.slow
@pytest.mark.multidevice
def test_runs_on_every_mesh_with_accumulation_have_the_same_numbers(curve):
    expected = curve("data=1", 1)
    for mesh, parts in CASES:
        found = curve(mesh, parts)
        worst = np.abs(found / expected - 1).max()
        print(f"{mesh}, accumulation {parts}: {worst:.1e}")
        # Sums of float32 in another order: the bound that is promised.
        np.testing.assert_allclose(
            found, expected, rtol=1e-5, err_msg=f"{mesh}, accumulation {parts}"
        )
