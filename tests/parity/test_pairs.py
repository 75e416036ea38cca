import pytest

pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")
pytestmark = pytest.mark.parity

from parity import pairs  # noqa: E402
from parity.rows import failed  # noqa: E402


def test_rows_of_pairs_pass_and_fail_for_the_other_direction(monkeypatch):
    rows = pairs.random_rows([0])
    assert {row.name for row in rows} == {pairs.PLAIN, pairs.FUSED, pairs.FITTED}
    assert not failed(rows)
    right = pairs.our_pairs

    def swapped(name, texts):
        return right(name, texts._replace(student=texts.teacher, teacher=texts.student))

    monkeypatch.setattr(pairs, "our_pairs", swapped)
    assert len(failed(pairs.random_rows([0]))) == len(rows)
