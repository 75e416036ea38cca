import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")
# Of parity itself: `python -m parity` shows the rows, and CI runs both.
pytestmark = pytest.mark.parity

from parity import models  # noqa: E402
from parity.rows import failed  # noqa: E402


def _rows(*names, outputs=models.our_outputs):
    configs = {name: models.CONFIGS[name] for name in names}
    return models.random_rows([0], configs, outputs)


@pytest.mark.real_model
def test_smollm2_rows_agree():
    rows = models.smollm2_rows()
    if rows[0].skipped:
        pytest.skip(rows[0].note)
    assert failed(rows) == []


def test_smollm2_rows_say_when_there_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TAID_JAX_CACHE", str(tmp_path))
    (row,) = models.smollm2_rows()
    assert row.skipped
    assert "--fetch" in row.note


def _without(key):
    """Returns our outputs for batches that lack something."""

    def outputs(folder, found):
        kept = [
            batch._replace(ours={k: v for k, v in batch.ours.items() if k != key})
            for batch in found
        ]
        return models.our_outputs(folder, kept)

    return outputs


# Rotary positions are relative: a sequence further along is the same sequence, so that
# positions alone make no difference.
@pytest.mark.parametrize("key", ["attention_mask", "segment_ids"])
def test_table_fails_without(key):
    assert failed(_rows("grouped heads, untied", outputs=_without(key)))


def test_table_fails_for_another_rope(monkeypatch):
    from parity.models import load_model

    def other_theta(source, **settings):
        model = load_model(source, **settings)
        rope = dataclasses.replace(model.config.rope, theta=9000.0)
        return dataclasses.replace(
            model, config=dataclasses.replace(model.config, rope=rope)
        )

    monkeypatch.setattr(models, "load_model", other_theta)
    assert failed(_rows("grouped heads, untied"))
