"""Tests of the documentation: code that it shows runs, links and files are there."""

import pathlib
import re
import runpy

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*_pair.py"))


def _blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.S)):
            # A page that shows a program names its file, which is run as such below.
            if "--8<--" not in block:
                name = f"{page.relative_to(ROOT)}, {number}"
                yield pytest.param(name, block, id=name)


@pytest.fixture(autouse=True)
def as_a_user_has_it():
    # Flax and optax are not written for the strict settings of these tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(("name", "block"), list(_blocks()))
def test_code_of_a_page_runs(name, block):
    exec(compile(block, name, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_brings_the_student_closer_to_its_teacher(path):
    before, after = runpy.run_path(str(path))["main"]()
    assert after < before / 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    targets += re.findall(r'--8<-- "([^"]+)"', text)
    missing = [
        target
        for target in targets
        if not (page.parent / target).exists() and not (ROOT / target).exists()
    ]
    assert not missing


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
