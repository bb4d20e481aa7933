"""One step under observation inside a fit: nothing else changes, and Lightning's wrapper is understood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_optim as lo
from tests.helpers import make_trainer


class Watched(LightningModule):
    def __init__(self, look: bool, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.automatic_optimization = not manual
        self.look, self.seen = look, []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.net(batch).square().mean()
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.seen.append(lo.debug_step(optimizer, model=self))
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.look:
            self.seen.append(lo.debug_step(optimizer, model=self, undo=True))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fitted(ours: bool, look: bool, manual: bool = False) -> Watched:
    model = Watched(look, manual)
    callbacks = [
        lo.ConfigureOptimizers("adamw", lr=1e-3, schedule="cosine", weight_decay=0.1),
        lo.GradientClipping(0.1),
        lo.DivergenceGuard(),
        lo.OptimizerMonitor(),
    ]
    trainer = make_trainer(callbacks if ours else [], max_steps=4)
    trainer.fit(model, DataLoader(torch.arange(512.0).reshape(64, 8).sin(), 16))
    assert trainer.global_step == 4
    return model


@pytest.mark.parametrize("ours", [False, True])
def test_a_look_in_a_hook_leaves_the_fit_as_it_is_bit_for_bit(ours: bool) -> None:
    looked = fitted(ours, look=True)
    assert [report.kinds for report in looked.seen] == [[]] * 4
    for name, value in fitted(ours, look=False).state_dict().items():
        assert torch.equal(value, looked.state_dict()[name]), name


def test_in_manual_optimization_it_is_the_step() -> None:
    model = fitted(ours=False, look=False, manual=True)
    assert [report.kinds for report in model.seen] == [[]] * 4, str(model.seen[0])
    assert [report.rows[0].step_after for report in model.seen] == [1, 2, 3, 4]
