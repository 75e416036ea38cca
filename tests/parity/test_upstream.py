import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")
# Of parity itself: `python -m parity` shows the rows, and CI runs both.
pytestmark = pytest.mark.parity

from parity.cases import Grid, random_cases  # noqa: E402
from parity.outcomes import torch_outcome  # noqa: E402
from parity.schedule import histories, published_history  # noqa: E402
from parity.subjects import SUBJECTS  # noqa: E402
from parity.torch_reference import published_loss  # noqa: E402
from parity.upstream import Upstream, UpstreamError, load_upstream  # noqa: E402

# A stand-in for a checkout: the published names and call shapes. What it computes is
# the reference's, so that only the way there can go wrong.
BASE = """
from typing import Optional, Union
import torch
import wandb
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedModel
from parity.torch_reference import Settings, published_loss

class DistilLoss(torch.nn.Module):
    def helper(self, module: Optional[LightningModule]): ...

class Callback(LightningModule):
    model: Union[PreTrainedModel, None] = None

def loss_of(name, logits, teacher_logits, mask, labels=None, **settings):
    labels = torch.zeros_like(mask).long() if labels is None else labels
    rows = logits, teacher_logits, mask, labels
    return published_loss(name, *rows, Settings(**settings))
"""
PLAIN = """
from .base import DistilLoss, loss_of

class {name}(DistilLoss):
    def __init__(self{settings}):
        super().__init__()
        self.settings = dict({given})

    def forward(self, logits, teacher_logits, mask, **kwargs):
        return loss_of("{loss}", logits, teacher_logits, mask, **self.settings)
"""
CTKD = """
import torch
from .base import DistilLoss, loss_of

class CTKD(DistilLoss):
    def __init__(self, num_loops: int = 10):
        super().__init__()
        self.raw = torch.nn.Parameter(torch.ones(1, device="cuda"))

    def forward(self, lightning_module, logits, teacher_logits, mask, **kwargs):
        assert lightning_module.current_epoch in range(10)
        t = 1 + 20 * torch.sigmoid(self.raw)
        loss = loss_of("ctkd", logits, teacher_logits, mask, temperature=t)
        return {"distil_loss": loss, "temperature": t}
"""
DKD = """
from .base import DistilLoss, loss_of

class DKD(DistilLoss):
    def __init__(self, alpha: float = 1.0, beta: float = 0.5):
        super().__init__()
        self.settings = {"alpha": alpha, "beta": beta}

    def forward(self, lightning_module, logits, teacher_logits, mask, batch):
        labels = batch["model_inputs"]["labels"][..., 1:]
        rows = logits, teacher_logits, mask, labels
        return loss_of("dkd", *rows, **self.settings)
"""
TAID = """
import torch
from lightning import LightningModule
from .base import DistilLoss, loss_of

class TAID(DistilLoss):
    def __init__(self, t_start=0.4, t_end=1.0, alpha=5e-4, beta=0.99,
                 disable_adaptive=False):
        super().__init__()
        self.t_start, self.t_end, self.alpha = t_start, t_end, alpha
        self.beta, self.linear = beta, disable_adaptive
        one = lambda value: torch.tensor(value, device="cuda", dtype=torch.float32)
        self.register_buffer("t", one(t_start))
        self.register_buffer("prev_loss", one(float("inf")))
        self.register_buffer("momentum", torch.zeros([], device="cuda"))

    def update_t(self, loss, global_step: int, num_train_steps: int):
        if torch.isinf(self.prev_loss):
            self.prev_loss = loss
            return
        fall = (self.prev_loss - loss) / (self.prev_loss + 1e-15)
        self.momentum = self.beta * self.momentum + (1 - self.beta) * fall
        delta = self.alpha * torch.sigmoid(self.momentum) * (1 - self.t)
        line = self.t_start + (self.t_end - self.t_start) * (
            global_step / num_train_steps)
        t = line if self.linear else min(self.t_end, max(line, float(self.t + delta)))
        self.t, self.prev_loss = torch.tensor(t), loss
        return delta

    def forward(self, lightning_module: LightningModule, logits, teacher_logits, mask,
                batch, **kwargs):
        loss = loss_of("taid", logits, teacher_logits, mask, t=float(self.t))
        self.update_t(loss.detach(), lightning_module.global_step,
                      lightning_module.trainer.estimated_stepping_batches)
        lightning_module.log("train/t", self.t)
        return {"distil_loss": loss, "t": self.t}
"""
PLAINS = {
    "fkl": ("ForwardKL", "forward_kl", ""),
    "rkl": ("ReverseKL", "reverse_kl", ""),
    "tvd": ("TVD", "total_variation", ""),
    "js": ("JS", "jensen_shannon", "teacher_weight"),
    "skew_fkl": ("SkewForwardKL", "skew_forward_kl", ""),
    "skew_rkl": ("SkewReverseKL", "skew_reverse_kl", ""),
    "adaptive_kl": ("AdaptiveKL", "adaptive_kl", "head_threshold"),
}


@pytest.fixture
def checkout(tmp_path):
    losses = tmp_path / "src" / "distil_losses"
    losses.mkdir(parents=True)
    files = {"base": BASE, "ctkd": CTKD, "dkd": DKD, "taid": TAID}
    for stem, (name, loss, setting) in PLAINS.items():
        settings = given = ""
        if setting:
            settings, given = f", {setting}: float = 0.1", f"{setting}={setting}"
        files[stem] = PLAIN.format(name=name, loss=loss, settings=settings, given=given)
    for stem, code in files.items():
        (losses / f"{stem}.py").write_text(code)
    # What it exports, and that it pulls in the whole trainer, must not matter.
    (losses / "__init__.py").write_text("import lightning_of_another_name")
    return tmp_path


def test_upstream_gives_the_losses_of_a_checkout(checkout):
    upstream = load_upstream(checkout)
    grid = Grid(scales=(1.0,), vocabs=(13,), dtypes=("float32",))
    case = next(random_cases(grid, 0))
    for subject in (each for each in SUBJECTS if not each.later):
        theirs = torch_outcome(subject, upstream.loss, case, "float32")
        ours = torch_outcome(subject, published_loss, case, "float32")
        assert theirs.value == pytest.approx(ours.value, rel=1e-6)
        np.testing.assert_allclose(theirs.gradient, ours.gradient, rtol=1e-6)


def test_upstream_gives_the_schedule_of_a_checkout(checkout):
    upstream = load_upstream(checkout)
    for settings, losses in histories(0, 200).values():
        theirs = published_history(settings, losses, upstream)
        ours = published_history(settings, losses)
        np.testing.assert_allclose(theirs.t, ours.t, rtol=0, atol=1e-7)
        np.testing.assert_allclose(theirs.momentum, ours.momentum, rtol=0, atol=1e-7)


def test_upstream_leaves_the_real_modules_in_place(checkout):
    import transformers

    path = list(sys.path)
    Upstream(checkout)
    assert sys.modules["transformers"] is transformers
    assert transformers.LlamaConfig is not None
    assert "lightning" not in sys.modules
    assert sys.path == path


def test_upstream_says_what_is_no_checkout(tmp_path):
    with pytest.raises(UpstreamError, match="distil_losses"):
        Upstream(tmp_path)


def test_upstream_names_missing_classes(checkout):
    (checkout / "src" / "distil_losses" / "js.py").unlink()
    with pytest.raises(UpstreamError, match="JS"):
        Upstream(checkout)


def test_upstream_names_a_module_that_does_not_import(checkout):
    (checkout / "src" / "distil_losses" / "js.py").write_text("import nonsense_xyz")
    with pytest.raises(UpstreamError, match=r"js\.py.*nonsense_xyz"):
        Upstream(checkout)


def test_upstream_gives_the_gradient_of_the_temperature(checkout):
    from parity.published import temperature_gradient

    grid = Grid(scales=(1.0,), vocabs=(13,), dtypes=("float32",))
    case = next(random_cases(grid, 0))
    inputs = [torch.tensor(a) for a in (case.student, case.teacher, case.mask)]
    # At epoch 0 the published strength is 1, which the stand-in leaves out.
    expected = temperature_gradient(*inputs, 0)
    found = Upstream(checkout).temperature_gradient(*inputs, 0)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parity
def test_whole_run_replays_against_a_checkout(checkout, golden):
    from parity.rows import failed
    from parity.run import again_rows

    rows = again_rows(golden / "run_taid", load_upstream(checkout))
    assert failed(rows) == []
    assert {row.other for row in rows} == {"upstream"}
