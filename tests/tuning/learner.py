"""A module that learns something in a few dozen steps, with its data."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo


class Learner(L.LightningModule):
    """Fits a smooth function of four numbers.

    Args:
        lr: Rate of its own optimizer.
        width: Number of hidden units.
    """

    def __init__(self, lr: float = 1e-4, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(4, width), nn.Linear(width, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.head(torch.tanh(self.body(inputs))), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def train_dataloader(self) -> DataLoader[Any]:
        inputs = torch.randn(512, 4, generator=torch.Generator().manual_seed(1))
        targets = torch.sin(inputs.sum(dim=1, keepdim=True)) + 3 * inputs[:, :1]
        return DataLoader(TensorDataset(inputs, targets), 32, shuffle=True)

    val_dataloader = train_dataloader


class Bare(Learner):
    """The same without an optimizer of its own."""

    configure_optimizers = L.LightningModule.configure_optimizers


def groups() -> list[Any]:
    """A head of another rate."""
    return [lo.ParamGroupRule(name="head", pattern=r"^head\.", lr_multiplier=3)]
