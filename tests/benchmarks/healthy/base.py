"""The base of all healthy runs: a module that brings its own data and says how well it has done."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F


class Healthy(L.LightningModule):
    """A run in which nothing is wrong.

    The data depend on the seed and the number of the batch only, so that a skipped step or a rollback changes what is
    learned from them and not what they are.

    Args:
        seed: Seed of the weights, the data and all that is drawn in training.
    """

    steps: ClassVar[int] = 800
    """Number of batches."""
    every: ClassVar[int] = 25
    """`log_every_n_steps`."""
    precision: ClassVar[str] = "32-true"
    metric: ClassVar[str] = "accuracy"
    """Name of what `score` returns."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def make_batch(self, step: int, rng: torch.Generator) -> Any:
        """Return the batch of a step, numbered from 0."""
        raise NotImplementedError

    def score(self) -> float:
        """Return how well the trained model does; more is better."""
        raise NotImplementedError

    def train_dataloader(self) -> Any:
        return _Batches(self)


class Classifier(Healthy):
    """Digits by a perceptron, and the parts that the kinds of supervised runs vary.

    Attributes:
        net: The network, from [batch, 64] to [batch, 10].
    """

    batch_size: ClassVar[int] = 64
    lr: ClassVar[float] = 1e-3

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.net = self.network()
        self._order = torch.empty(0, dtype=torch.long)

    def network(self) -> nn.Module:
        return mlp(64, 64, 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result

    def make_batch(self, step: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = digits("train")
        rows = self.draw(len(x), rng)
        return x[rows], y[rows]

    def draw(self, samples: int, rng: torch.Generator) -> Tensor:
        """Return the rows of the next batch, each row once in an epoch."""
        if len(self._order) < self.batch_size:
            self._order = torch.randperm(samples, generator=rng)
        rows, self._order = self._order[: self.batch_size], self._order[self.batch_size :]
        return rows

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def score(self) -> float:
        x, y = digits("test")
        return float((self(x).argmax(1) == y).float().mean())


class _Batches:
    """The batches of a run, in its only epoch."""

    def __init__(self, module: Healthy) -> None:
        self._module = module

    def __len__(self) -> int:
        return self._module.steps

    def __iter__(self) -> Iterator[Any]:
        rng = torch.Generator().manual_seed(self._module.seed)
        return (self._module.make_batch(step, rng) for step in range(self._module.steps))


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers with an activation between each two."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        layers += [activation()] * (i > 0) + [nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


@cache
def digits(part: str) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, pixels [samples, 64] in [0, 1] and classes; 1397 to train on, 400 to test."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    rows = order[400:] if part == "train" else order[:400]
    return torch.tensor(x, dtype=torch.float32)[rows] / 16, torch.tensor(y)[rows]
