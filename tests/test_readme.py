import pathlib
import re

import jax
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda text: text.split("\n", 1)[0])
def test_readme_code_runs(block):
    # As a user has it: Flax is not written for the strict settings of these tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, str(README), "exec"), {"__name__": "readme"})


def test_readme_shows_a_linen_and_an_nnx_loop():
    assert any("nn.Module" in block for block in BLOCKS)
    assert any("nnx." in block for block in BLOCKS)


def test_readme_file_map_names_files_that_exist():
    text = README.read_text(encoding="utf-8")
    section = text.split("## Files", 1)[1]
    names = re.findall(r"^\s+([\w./-]+\.(?:py|yaml|md|toml))\b", section, re.M)
    assert len(names) > 20
    missing = [name for name in names if not (README.parent / name).exists()]
    assert not missing
