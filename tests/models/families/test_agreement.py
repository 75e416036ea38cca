"""Every family against transformers in PyTorch: values, gradients, exported folders."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def largest_error(ours, theirs):
    """The largest difference in units of the largest number expected."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def check_values(expected, got):
    # Padding on both sides, packed sequences, more tokens than window and context.
    # Rounding of float32 through the layers is near 1e-6; the project promises 1e-4.
    assert largest_error(got.hidden, expected.hidden) < 2e-5
    assert largest_error(got.logits, expected.logits) < 2e-5


def check_gradients(expected, got):
    assert set(got.gradient) == set(expected.gradient)
    norms = {name: np.linalg.norm(each) for name, each in expected.gradient.items()}
    # Where nothing but rounding is left (keys' biases do nothing without positions),
    # it is compared with what other gradients are.
    least = 0.01 * np.median(list(norms.values()))
    for name, theirs in expected.gradient.items():
        ours = got.gradient[name]
        assert ours.shape == theirs.shape, name
        # Rounding is near 1e-6 of the norm; the project promises 1e-3.
        error = np.linalg.norm(ours - theirs) / max(norms[name], least)
        assert error < 1e-4, name


def test_hidden_states_and_logits_are_those_of_transformers(case, outcomes):
    check_values(*outcomes(case))


def test_gradients_are_those_of_transformers(case, outcomes):
    check_gradients(*outcomes(case))


def check_export(case, batch, folder, caplog):
    """Ours is written, read back bit for bit, and is transformers' own model again."""
    from taid_jax.models.files.load import export_model, load_model

    export_model(folder, case.config, case.params, max_shard_bytes=4000)
    after = load_model(folder)
    assert after.config == case.config
    jax.tree.map(np.testing.assert_array_equal, after.params, case.params)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model = model_of_transformers(folder)
    finally:
        logger.removeHandler(caplog.handler)
    warnings = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    # Transformers 4 refuses the field that transformers 5 would rather see; it says so
    # of the published models as well.
    assert [text for text in warnings if "set the `factor` field" not in text] == []
    assert type(model) is type(case.torch_model)
    ids = batch["input_ids"][2:3]
    ours, theirs = (logits_of(each, ids) for each in (model, case.torch_model))
    # The same program on the same numbers, but for what a config rounds.
    assert largest_error(ours, theirs) < 1e-6


def model_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(found.values()), found
    return model.eval()


def logits_of(model, ids):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(ids).long()).logits.numpy()


def test_export_model_gives_transformers_its_model_back(case, batch, tmp_path, caplog):
    check_export(case, batch, tmp_path / "m", caplog)


@pytest.mark.slow
def test_variants_agree_with_transformers(variant, outcomes, batch, tmp_path, caplog):
    check_values(*outcomes(variant))
    check_gradients(*outcomes(variant))
    check_export(variant, batch, tmp_path / "m", caplog)


@pytest.mark.parametrize(("name", "layers"), [("gemma3_text", 2), ("smollm3", 3)])
def test_student_of_some_layers_is_the_same_in_transformers(
    name, layers, make_case, batch, tmp_path
):
    from taid_jax.models.decoder import decoder_functions, select_layers
    from taid_jax.models.files.load import export_model

    case = make_case(name)
    params, config = select_layers(case.params, case.config, layers)
    export_model(tmp_path / "student", config, params)
    ids = batch["input_ids"][2:3]
    theirs = logits_of(model_of_transformers(tmp_path / "student"), ids)
    functions = decoder_functions(config)
    hidden = jax.jit(functions.hidden)(params, {"input_ids": jnp.asarray(ids)})
    # As above; which layers have a window, and which turn, was read back.
    assert largest_error(functions.head(params).logits(hidden), theirs) < 2e-5
