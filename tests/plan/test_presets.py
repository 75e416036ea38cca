import jax
import pytest

from taid_jax.errors import ModelError
from taid_jax.models.decoder import abstract_params
from taid_jax.models.presets import preset


def test_preset_unknown_lists_the_known():
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
        ("qwen2-0.5b", 494_032_768),
        ("qwen2-1.5b", 1_543_714_304),
        ("qwen2-7b", 7_615_616_512),
        ("qwen2-72b", 72_706_203_648),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("mistral-7b", 7_241_732_096),
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-2-9b", 9_241_705_984),
        ("gemma-2-27b", 27_227_128_320),
        ("gemma-3-1b", 999_885_952),
        ("phi-3-mini", 3_821_079_552),
        ("phi-4", 14_659_507_200),
        ("stablelm-zephyr-3b", 2_795_443_200),
        ("pythia-160m", 162_322_944),
        ("pythia-410m", 405_334_016),
        ("pythia-1.4b", 1_414_647_808),
        ("olmo-2-1b", 1_484_916_736),
        ("smollm3-3b", 3_075_098_624),
        ("gpt2", 124_439_808),
    ],
)
def test_preset_has_the_parameters_of_its_model(name, parameters):
    leaves = jax.tree.leaves(abstract_params(preset(name)))
    assert sum(leaf.size for leaf in leaves) == parameters


def test_presets_of_qwen2_have_no_bias_but_that_of_queries_keys_and_values():
    layers = abstract_params(preset("qwen2-72b"))["layers"]
    biased = {name for name, part in layers["attention"].items() if "bias" in part}
    assert biased == {"q_proj", "k_proj", "v_proj"}
    assert not any("bias" in part for part in layers["mlp"].values())
