import jax
import pytest


def test_preset_unknown_lists_the_known():
    from taid_jax.models.errors import ModelError
    from taid_jax.models.presets import preset

    with pytest.raises(ModelError, match="tinyllama"):
        preset("gpt-5")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As counted by the models' makers: model cards and safetensors headers.
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        # Without the biases that these presets have too many.
        ("qwen2-72b", 72_706_203_648 + 80 * 8192),
        ("qwen2-1.5b", 1_543_714_304 + 28 * 1536),
    ],
)
def test_preset_has_the_parameters_of_its_model(name, parameters):
    from taid_jax.models.decoder import abstract_params
    from taid_jax.models.presets import preset

    leaves = jax.tree.leaves(abstract_params(preset(name)))
    assert sum(leaf.size for leaf in leaves) == parameters
