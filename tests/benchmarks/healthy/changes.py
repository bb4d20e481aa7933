"""Runs whose loss, data or trained parameters change on purpose while they train."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.healthy.base import Classifier, digits, mlp


class TermJoins(Classifier):
    """In mid-run a reconstruction of the image joins the loss, which is then as high as at the start."""

    steps = 1000
    weight: ClassVar[float] = 0.5

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.body, self.back = mlp(64, 64, 32), mlp(32, 64)
        self.head = nn.Linear(32, 10)
        self.net = nn.Sequential(self.body, nn.ReLU(), self.head)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        code = F.relu(self.body(x))
        loss = F.cross_entropy(self.head(code), y)
        if self.joined(batch_idx):
            loss = loss + self.weight * F.mse_loss(self.back(code), x)
        return loss

    def joined(self, step: int) -> bool:
        return step >= self.steps // 2


class LargeTermJoins(TermJoins):
    """The same term with such a weight that the loss is far above all that the run has had."""

    weight = 10.0


class TermLeaves(TermJoins):
    """The reconstruction leaves in mid-run."""

    weight = 10.0

    def joined(self, step: int) -> bool:
        return step < self.steps // 2


class CurriculumInJumps(Classifier):
    """Three classes, then six, then all."""

    steps = 2000

    def make_batch(self, step: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = digits("train")
        known = (y < (3, 6, 10)[3 * step // self.steps]).nonzero().squeeze(1)
        if 3 * step // self.steps != 3 * (step - 1) // self.steps:
            self._order = self._order[:0]
        rows = known[self.draw(len(known), rng)]
        return x[rows], y[rows]


class GradualCurriculum(Classifier):
    """Images with more and more noise over them."""

    def make_batch(self, step: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = super().make_batch(step, rng)
        return x + 0.8 * step / self.steps * torch.randn(x.shape, generator=rng), y


class Unfreezing(Classifier):
    """A body that knows digits 0 to 4; first a new head alone is trained, then all, in a further parameter group."""

    thawed: ClassVar[int] = 300

    def network(self) -> nn.Module:
        body = mlp(64, 64, 64)
        x, y = digits("train")
        x, y = x[y < 5], y[y < 5]
        old = nn.Sequential(body, nn.ReLU(), nn.Linear(64, 5))
        optimizer = torch.optim.AdamW(old.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(old(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        return nn.Sequential(body.requires_grad_(False), nn.ReLU(), nn.Linear(64, 10))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.thawed:
            self.thaw()

    def thaw(self) -> None:
        """Train the body as well, at a lower rate, as Lightning's callbacks for it do."""
        BaseFinetuning.unfreeze_and_add_param_group(self.net[0], self.trainer.optimizers[0], lr=self.lr / 3)  # type: ignore[index]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net[2].parameters(), lr=self.lr)  # type: ignore[index]


class UnfreezingInPlace(Unfreezing):
    """The same with all parameters in the optimizer from the start, and at one rate."""

    def thaw(self) -> None:
        self.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class TasksInTurn(Classifier):
    """Two tasks with losses of other sizes: three steps of classes, then one of the sum of the pixels."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.body, self.total = mlp(64, 64, 64), nn.Linear(64, 1)
        self.net = nn.Sequential(self.body, nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if batch_idx % 4 < 3:
            return F.cross_entropy(self.net(x), y)
        return F.mse_loss(self.total(F.relu(self.body(x)))[:, 0], x.sum(1) / 4)
