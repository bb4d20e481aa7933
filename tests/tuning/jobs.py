"""Modules and data for fits in other processes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Small(L.LightningModule):
    """A linear model without an optimizer of its own."""

    def __init__(self, width: int = 4, noise: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.1 * noise), nn.Linear(width, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.layers(x), y))


class Own(Small):
    """The same with an optimizer and a schedule of its own."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5), "interval": "step"}]


class Points(L.LightningDataModule):
    """A linear task."""

    def train_dataloader(self) -> Any:
        return DataLoader(_points(48, 0), batch_size=8, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(_points(16, 1), batch_size=8)


def _points(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))
