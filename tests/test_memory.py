import os

import pytest

from taid_jax.models.memory import host_memory

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(
    ("text", "found"),
    [("1048576\n", 2**20), ("max\n", PHYSICAL), (f"{2**63 - 4096}\n", PHYSICAL)],
)
def test_host_memory_is_the_least_of_machine_and_container(tmp_path, name, text, found):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert host_memory(tmp_path) == found


def test_host_memory_without_containers_is_the_machines(tmp_path):
    assert host_memory(tmp_path) == PHYSICAL
    assert 0 < host_memory() <= PHYSICAL
