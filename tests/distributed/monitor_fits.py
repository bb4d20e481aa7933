"""Fits on two ranks under a monitor; called on each rank by test_monitor_ddp.py."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from tests.helpers import Net, batches, make_trainer
from tests.quantities import FAMILIES, train

KINDS = ("adamw", "torch-adamw-fused", "muon")
STEPS, BATCH, FEATURES = 60, 4, 16
MEAN, SPREAD = 0.5, 2.0


class Drift(L.LightningModule):
    """The gradient of its loss is the mean of the inputs, whatever the weights: noise scale of one sample known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(FEATURES))

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.weight).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def drifting(count: int, spread: float, batch_size: int) -> DataLoader:
    """Data for it, with which that is ``spread``²/`MEAN`²."""
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(MEAN + spread * torch.randn(count, FEATURES, generator=generator)), batch_size)


class Alone(L.Callback):
    """What this rank's gradient would be without the other."""

    def __init__(self) -> None:
        self.norm_sq = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        loss = nn.functional.mse_loss(pl_module(batch[0]), batch[1])
        grads = torch.autograd.grad(loss, list(pl_module.parameters()))
        self.norm_sq.append(sum(g.double().square().sum() for g in grads))


def options(folder: Path, name: str) -> dict:
    return {
        "devices": 2,
        "strategy": DDPStrategy(process_group_backend="gloo"),
        "logger": TensorBoardLogger(folder, name=name, version="0"),
    }


def fit_all(folder: Path) -> dict:
    """All of this file, one after another; what this rank has to show."""
    results = {}
    for kind in KINDS:
        results[kind] = train(family=FAMILIES[kind], clips=True, precision="64-true", **options(folder, kind))
    alone = Alone()
    parts = [lo.ConfigureOptimizers("adamw", lr=0.01), alone, lo.OptimizerMonitor()]
    make_trainer(parts, **options(folder, "alone")).fit(Net(), batches(16))
    results["alone"] = alone.norm_sq
    data = drifting(STEPS * 2 * BATCH, SPREAD, BATCH)
    make_trainer([lo.OptimizerMonitor()], **options(folder, "drift")).fit(Drift(), data)
    return results
