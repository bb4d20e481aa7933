"""Five small real trainings that go well: real data, five architectures, five optimizers and schedules."""

from __future__ import annotations

import argparse
import ast
import inspect
import logging
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as L
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from tests.helpers import make_trainer


@dataclass(frozen=True)
class Training:
    """A task, a network and how it is trained.

    Args:
        network: Makes the network.
        data: Makes inputs and targets.
        loss: Of outputs and targets.
        lr: A good learning rate: of a grid with factors of 3, the one with the least loss at the end, or nearly so.
        configure: Further arguments of ConfigureOptimizers.
        precision: Of the Trainer.
        clip: Gradient norm; None for no clipping.
        batch_size: Samples in a step.
    """

    network: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    configure: dict[str, Any] = field(default_factory=dict)
    precision: Any = "32-true"
    clip: float | None = None
    batch_size: int = 32


class Module(L.LightningModule):
    """Trains a network and keeps its losses."""

    def __init__(self, training: Training, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network, self.training_, self.losses = training.network(), training, []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.training_.loss(self.network(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    training: Training, callbacks: Iterable[L.Callback], steps: int, lr_factor: float = 1.0, seed: int = 0
) -> list[float]:
    """Trains for so many steps; the losses."""
    inputs, targets = training.data()
    loader = DataLoader(
        TensorDataset(inputs, targets),
        training.batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    configure = lo.ConfigureOptimizers(lr=training.lr * lr_factor, **training.configure)
    parts = [configure, *callbacks] + ([] if training.clip is None else [lo.GradientClipping(training.clip)])
    module = Module(training, seed)
    trainer = make_trainer(parts, max_steps=steps, max_epochs=-1, log_every_n_steps=10, precision=training.precision)
    trainer.fit(module, loader)
    return torch.stack(module.losses).tolist()


def _digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def _diabetes() -> tuple[Tensor, Tensor]:
    """Ten measurements, cut into twenty classes each, and the progress of the disease in standard deviations."""
    x, y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
    cuts = torch.linspace(0.05, 0.95, 19)
    classes = torch.stack([torch.bucketize(column, column.quantile(cuts)) for column in x.T.contiguous()], dim=1)
    return classes + 20 * torch.arange(10), (y - y.mean()) / y.std()


def _sources() -> tuple[Tensor, Tensor]:
    """Windows of 32 bytes out of the standard library's sources, and the byte after each of them."""
    text = "".join(inspect.getsource(module) for module in (argparse, ast, inspect, logging, typing))
    windows = torch.tensor(list(text.encode("ascii", "replace")))[: 33 * 8000].reshape(-1, 33)
    return windows[:, :-1], windows[:, 1:]


class Transformer(nn.Module):
    """Two causal layers."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(128, dim), nn.Parameter(0.02 * torch.randn(32, dim))
        layer = nn.TransformerEncoderLayer(dim, 2, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 128))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(32))

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(text) + self.positions, self.mask, is_causal=True)).flatten(0, 1)


class RowByRow(nn.Module):
    """A GRU that reads an image of 8 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.GRU(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.rows(image.reshape(-1, 8, 8))[1][-1])


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(32, 10)),
    )


def _table() -> nn.Module:
    return nn.Sequential(nn.Embedding(200, 4), nn.Flatten(), nn.Linear(40, 32), nn.GELU(), nn.Linear(32, 1))


def _squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs[:, 0], targets)


TRAININGS: dict[str, Training] = {
    "perceptron, SGD": Training(
        _perceptron,
        _digits,
        F.cross_entropy,
        lr=0.1,
        configure={"optimizer": "sgd", "optimizer_kwargs": {"momentum": 0.9}, "schedule": "cosine", "warmup": "5%"},
    ),
    "convolutions, AdamW, bf16": Training(
        _convolutions,
        _digits,
        F.cross_entropy,
        lr=0.03,
        configure={"optimizer": "adamw", "weight_decay": 0.05, "schedule": "one_cycle"},
        precision="bf16-mixed",
    ),
    "transformer, AdamW": Training(
        Transformer,
        _sources,
        lambda outputs, targets: F.cross_entropy(outputs, targets.flatten()),
        lr=0.01,
        configure={"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "warmup": "10%"},
        clip=1.0,
    ),
    "embeddings, RMSprop": Training(
        _table, _diabetes, _squares, lr=0.01, configure={"optimizer": "rmsprop", "schedule": "constant"}
    ),
    "GRU, Lion": Training(
        RowByRow,
        _digits,
        F.cross_entropy,
        lr=0.01,
        configure={"optimizer": "lion", "weight_decay": 0.1, "schedule": "wsd", "warmup": "5%"},
        clip=1.0,
    ),
}
