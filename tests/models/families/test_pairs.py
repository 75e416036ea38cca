"""Teachers and students of different families, whole and cut over eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

RING = (
    *("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3"),
    *("stablelm", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2"),
)


def loss_and_gradient(teacher, student, teacher_params, params, batch, mesh):
    """TAID through the fused head, and its gradient by the student's parameters."""
    from taid_jax import loss
    from taid_jax.models.decoder import decoder_functions
    from taid_jax.train.step import batch_loss

    # Half the time of compiling; nothing here runs long.
    options = {"xla_backend_optimization_level": 0}

    @functools.partial(jax.jit, compiler_options=options)
    @functools.partial(jax.value_and_grad, argnums=0, has_aux=True)
    def run(params, teacher_params, batch):
        return batch_loss(
            loss.TAID(jnp.float32(0.6)),
            decoder_functions(student.config),
            params,
            decoder_functions(teacher.config),
            teacher_params,
            batch,
            mesh=mesh,
        )

    (total, sums), gradient = run(params, teacher_params, batch)
    return total / sums["num_tokens"], gradient


def check_pair(teacher, student, batch):
    from taid_jax.models.decoder import abstract_params, param_axes
    from taid_jax.models.files.hf import open_folder
    from taid_jax.models.files.weights import load_params
    from taid_jax.sharding import make_mesh, place_batch, tree_shardings

    labels = np.where(batch["attention_mask"] != 0, batch["input_ids"], -100)
    batch = {**batch, "labels": labels.astype(np.int32)}
    whole = {name: jnp.asarray(array) for name, array in batch.items()}
    value, gradient = loss_and_gradient(
        teacher, student, teacher.params, student.params, whole, None
    )
    mesh = make_mesh("fsdp=4,tensor=2")

    def read(case):
        shardings = tree_shardings(
            param_axes(case.config), abstract_params(case.config), mesh
        )
        tensors = open_folder(case.folder)
        return load_params(case.config, tensors, dtype="float32", shardings=shardings)

    cut_value, cut_gradient = loss_and_gradient(
        teacher, student, read(teacher), read(student), place_batch(batch, mesh), mesh
    )
    # Sums of the same float32 numbers in another order.
    np.testing.assert_allclose(cut_value, value, rtol=1e-5)
    norms = jax.tree.map(np.linalg.norm, gradient)
    least = 0.01 * np.median(jax.tree.leaves(norms))

    def compare(mine, other, norm):
        assert np.linalg.norm(mine - other) / max(norm, least) < 1e-4

    jax.tree.map(compare, jax.device_get(cut_gradient), gradient, norms)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is not cut over")
@pytest.mark.multidevice
@pytest.mark.parametrize("index", range(len(RING)), ids=RING.__getitem__)
def test_every_family_teaches_and_learns_on_eight_devices(index, make_case, batch):
    check_pair(make_case(RING[index]), make_case(RING[index - 5]), batch)
