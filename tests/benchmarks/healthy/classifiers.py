"""Classifiers of digits that train well in ways that look odd from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.healthy.base import Classifier, digits, mlp


class SmallBatches(Classifier):
    """Batches of 4 with a fifth of the labels wrong: the loss of a step says little."""

    steps = 1000
    batch_size = 4

    def make_batch(self, step: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = super().make_batch(step, rng)
        return x, with_noise(y, 0.2, rng)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Overfitted(Classifier):
    """256 samples, learned by heart until the loss is next to 0."""

    def make_batch(self, step: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = digits("train")
        rows = self.draw(256, rng)
        return x[rows], y[rows]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-2)


class WarmRestarts(Classifier):
    """Momentum whose cosine starts anew every 200 steps."""

    batch_size = 32

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 200)
        return [optimizer], [{"scheduler": restarts, "interval": "step"}]


class OneCycle(Classifier):
    """One cycle with a peak so high that the loss rises before it falls."""

    batch_size = 32

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=self.steps)
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]


class LateLabelNoise(Classifier):
    """From the middle on two labels in five are drawn at random."""

    steps = 1000

    def make_batch(self, step: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = super().make_batch(step, rng)
        return x, with_noise(y, 0.4 if step >= self.steps // 2 else 0.0, rng)


class Convolutions(Classifier):
    """A convolutional network with batch normalization under bf16-mixed."""

    steps = 600
    precision = "bf16-mixed"

    def network(self) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
            *(nn.Flatten(), nn.Linear(32, 10)),
        )


class HalfPrecision(Classifier):
    """A perceptron under 16-mixed, whose scaler finds its scale from 2²⁰ on and overflows now and then."""

    precision = "16-mixed"
    init_scale = 2.0**20


class Experts(Classifier):
    """A mixture of 8 experts without a term that balances them: some get no sample in most steps, or ever."""

    def network(self) -> nn.Module:
        return Mixture(8)


class Mixture(nn.Module):
    """Each sample goes to the expert whose gate is the largest, and its output is weighted by that gate."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.body, self.gate = nn.Linear(64, 32), nn.Linear(32, experts)
        self.experts = nn.ModuleList(mlp(32, 32, 32) for _ in range(experts))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.body(x))
        weight, which = self.gate(hidden).softmax(1).max(1)
        mixed = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            if len(rows := (which == index).nonzero().squeeze(1)):
                mixed = mixed.index_add(0, rows, expert(hidden[rows]) * weight[rows, None])
        result: Tensor = self.head(hidden + mixed)
        return result


def with_noise(y: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Return classes of which a share is drawn at random."""
    wrong = torch.rand(len(y), generator=rng) < share
    return torch.where(wrong, torch.randint(10, y.shape, generator=rng), y)
