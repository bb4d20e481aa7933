"""Faults that last: what has to be noticed over many steps, named, rolled back or outlived."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim.divergence import Rollback
from tests.divergence.runs import QUICK, Cell, Fault, FaultyNet, Seen, fit, tensor_loader, trainer_of
from tests.helpers import StatefulLoader, bit_equal


def digits() -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] and classes; 1792 of them, which divide into micro-batches."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:1792], dtype=torch.float32) / 16, torch.tensor(y[:1792])


class GoesWrong(Fault):
    """A run on real data whose rate becomes too high: compared with itself without a guard."""

    number = 6
    keep_states = False
    wrong_from: int

    def guard(self) -> lo.DivergenceGuard:
        return lo.DivergenceGuard(lr_cut=None, rollback=Rollback(every=40, clean=30, lr_factor=0.1))

    def callbacks(self, guard: lo.DivergenceGuard) -> list[L.Callback]:
        return [guard]

    def run(self, cell: Cell, folder: Path) -> Seen:
        seen = fit(self, cell, folder)
        trainer, model = trainer_of(self, cell, []), self.model(cell)
        trainer.fit(model, self.loader(cell))
        seen.beside = [Seen(losses=model.losses)]
        return seen

    def check(self, cell: Cell, seen: Seen) -> None:
        did = seen.did()
        assert self.wrong_from <= did[0][0] <= self.wrong_from + 150
        assert did[0][1] == "back"
        guarded, unguarded = (sum(losses[-40:]) / 40 for losses in (seen.losses, seen.beside[0].losses))
        assert guarded < 0.8 * unguarded or (math.isfinite(guarded) and math.isnan(unguarded))


class CreepingUp(GoesWrong):
    """The loss grows by three thousandths a step: a warm-up that goes on just beyond the limit of stability, 2/λ.

    Gradient descent on least squares multiplies the part of the error that lies along the curvature's largest
    eigenvector by 1 − lr·λ in each step, so lr = 2.0015/λ has the loss grow by 1.003.
    """

    steps = 300
    wrong_from = 100

    def model(self, cell: Cell) -> L.LightningModule:
        return LeastSquares(cell, self.wrong_from)

    def loader(self, cell: Cell) -> Any:
        x, y = digits()
        targets = nn.functional.one_hot(y, 10).float()
        return Repeated(list(zip(x.chunk(cell.accumulate), targets.chunk(cell.accumulate), strict=True)), self.steps)

    def check(self, cell: Cell, seen: Seen) -> None:
        super().check(cell, seen)
        assert seen.of("slow_divergence")[0].step == seen.did()[0][0]
        a, b = (seen.beside[0].losses[(self.wrong_from + k) * cell.accumulate] for k in (30, 180))
        assert 1.002 < (b / a) ** (1 / 150) < 1.004  # the run is what it says


class Repeated:
    """The same batches over and over; no DataLoader, which Lightning would distribute over the ranks."""

    def __init__(self, batches: list[Any], times: int) -> None:
        self.batches, self.times = batches, times

    def __len__(self) -> int:
        return len(self.batches) * self.times

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.times):
            yield from self.batches


class LeastSquares(L.LightningModule):
    """Classes of digits by a linear map, at a rate close to what is stable; noisier loss than one would choose."""

    def __init__(self, cell: Cell, beyond_from: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(64, 10, bias=False)
        with torch.no_grad():
            self.map.weight.mul_(4)  # far enough from the minimum for its height not to matter
        x, _ = digits()
        self.limit = 2 / float(torch.linalg.eigvalsh(x.T @ x * 2 / 10 / len(x)).max())
        self.cell, self.beyond_from, self.losses = cell, beyond_from, []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = (tensor[self.global_rank :: self.cell.ranks] for tensor in batch)
        loss = nn.functional.mse_loss(self.map(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.limit)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.00075 if k >= self.beyond_from else 0.999)
        return [optimizer], [{"scheduler": rate, "interval": "step"}]


class RateTooHigh(GoesWrong):
    """The rate becomes 30 times as high: SGD with momentum."""

    steps = 300
    wrong_from = 100
    optimizer: tuple[Any, dict[str, Any]] = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})

    def model(self, cell: Cell) -> L.LightningModule:
        return Perceptron(self)

    def loader(self, cell: Cell) -> Any:
        x, y = digits()
        copies = -(-self.steps * 32 // len(x))
        loader = tensor_loader(
            x.repeat(copies, 1)[: self.steps * 32],
            y.repeat(copies)[: self.steps * 32],
            batch_size=32 // cell.accumulate // cell.ranks,
            shuffle=True,
        )
        return loader


class AdamWRateTooHigh(RateTooHigh):
    """The same with AdamW."""

    optimizer = (torch.optim.AdamW, {"lr": 1e-2})


class Perceptron(L.LightningModule):
    """Learns digits well at first."""

    def __init__(self, fault: RateTooHigh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.fault, self.losses = fault, []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        cls, options = self.fault.optimizer
        optimizer = cls(self.parameters(), **options)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 30.0 if k >= self.fault.wrong_from else 1.0)
        return [optimizer], [{"scheduler": rate, "interval": "step"}]


class Parts(Fault):
    """A part of the network does not learn as it should: told of, with its name, at the first logging step."""

    steps = 50
    batch_size = 32
    lr = 1e-3
    log_every = 40
    keep_states = False

    def callbacks(self, guard: lo.DivergenceGuard) -> list[L.Callback]:
        rules = [lo.ParamGroupRule(name="first", pattern="^body"), lo.ParamGroupRule(name="last", pattern="^head")]
        return [lo.ConfigureOptimizers("adamw", lr=self.lr, param_groups=rules), guard]


class Vanishing(Parts):
    """A deep stack of sigmoids: hardly any gradient arrives at its lower end."""

    number = 7

    def model(self, cell: Cell) -> FaultyNet:
        return Deep(self, cell)

    def check(self, cell: Cell, seen: Seen) -> None:
        # What is below fp16's range is exactly 0 there.
        told = [t for t in seen.told if t.kind == "vanishing" or (cell.scaled and t.kind == "dead")]
        assert {t.step for t in told} == {39}
        names = {name for t in told for name in t.names}
        assert "body.weight (group first)" in names
        assert not any("group last" in name for name in names)


class Deep(FaultyNet):
    def __init__(self, fault: Fault, cell: Cell) -> None:
        super().__init__(fault, cell)
        self.stack = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.Sigmoid())])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(self.norm(self.body(x))))


class DeadLayer(Parts):
    """Units that never fire."""

    number = 8

    def model(self, cell: Cell) -> FaultyNet:
        model = Unfiring(self, cell)
        with torch.no_grad():
            model.body.bias.fill_(-100.0)
        return model

    def check(self, cell: Cell, seen: Seen) -> None:
        (told,) = seen.of("dead")
        assert told.step == 39
        assert {"body.weight (group first)", "body.bias (group first)"} <= set(told.names)
        assert "head.bias (group last)" not in told.names


class Unfiring(FaultyNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.body(x))))


class FrozenByMistake(Parts):
    """Parameters that the optimizer has, and that get no gradient."""

    number = 8

    def model(self, cell: Cell) -> FaultyNet:
        return Frozen(self, cell)

    def callbacks(self, guard: lo.DivergenceGuard) -> list[L.Callback]:
        return [guard]

    def check(self, cell: Cell, seen: Seen) -> None:
        (told,) = seen.told
        assert (told.step, told.kind, told.names) == (39, "no_gradient", ["body.weight", "body.bias"])


class Frozen(FaultyNet):
    def __init__(self, fault: Fault, cell: Cell) -> None:
        super().__init__(fault, cell)
        self.body.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Exploding(Parts):
    """The gradient of one part grows by a factor of 1000, and no spike is looked for."""

    number = 7
    steps = 70
    log_every = 2

    def guard(self) -> lo.DivergenceGuard:
        return lo.DivergenceGuard(spikes=None)

    def model(self, cell: Cell) -> FaultyNet:
        return Amplifying(self, cell)

    def check(self, cell: Cell, seen: Seen) -> None:
        told = seen.of("exploding")[0]
        # In 16 bits the loss scale has to come down first, if the gradient is out of its range.
        assert 61 <= told.step <= (65 if cell.scaled else 61)
        assert told.names == ["group first"]


class Amplifying(FaultyNet):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.trainer.global_step >= 60:
            out.register_hook(lambda grad: grad * 1000)
        return self.head(torch.tanh(self.norm(out)))


class Interrupted(Fault):
    """A run that ends in the middle of everything, with spikes and bad steps behind it, and goes on from its file."""

    number = 11
    HALF = 32

    def guard(self) -> lo.DivergenceGuard:
        return lo.DivergenceGuard(QUICK, rollback=None, patience=2, cooldown=0)

    def loader(self, cell: Cell) -> Any:
        return StatefulLoader(self.steps * cell.accumulate, [], batch_size=self.batch_size // cell.accumulate)

    def factor(self, step: int, micro: int, last: bool) -> float:
        return 10.0 if step >= 30 and step % 2 == 0 else float("nan") if step in (26, 27, 28) else 1.0

    def run(self, cell: Cell, folder: Path) -> Seen:
        seen, half = fit(self, cell, folder), folder / "half.ckpt"
        first = fit(self, cell, folder, save=half, max_steps=self.HALF)
        seen.beside = [first, fit(self, cell, folder, resume=half, max_steps=self.steps)]
        return seen

    def callbacks(self, guard: lo.DivergenceGuard) -> list[L.Callback]:
        return [lo.ConfigureOptimizers("adamw", lr=self.lr, schedule="constant", warmup=3), guard]

    def check(self, cell: Cell, seen: Seen) -> None:
        first, second = seen.beside
        assert seen.told == first.told + second.told
        assert {"nonfinite", "did", "spike"} <= set(seen.kinds())
        assert bit_equal(seen.weights, second.weights)
        assert seen.skipped == second.skipped


class AverageBeside(Fault):
    """NaN in a row beside Lightning's average of the weights, which is rolled back as well."""

    number = 15
    steps = 24
    average_first = True

    def guard(self) -> lo.DivergenceGuard:
        return lo.DivergenceGuard(QUICK, lr_cut=None, rollback=Rollback(every=5, clean=2))

    def callbacks(self, guard: lo.DivergenceGuard) -> list[L.Callback]:
        average = EMAWeightAveraging(decay=0.9)
        configure = lo.ConfigureOptimizers("adamw", lr=self.lr)
        return [configure, average, guard] if self.average_first else [configure, guard, average]

    def factor(self, step: int, micro: int, last: bool) -> float:
        return float("nan") if 8 <= step < 13 else 1.0

    def check(self, cell: Cell, seen: Seen) -> None:
        assert seen.did() == [(12, "back")]
        averages = [[t for t in state["averages"][0].values() if t.is_floating_point()] for state in seen.after]
        assert all(tensor.isfinite().all() for row in averages for tensor in row)
        # Back to the average of the snapshot, which the callback that comes behind may have moved on once.
        (back_to,) = re.findall(r"after step (\d+)", seen.of("did")[0].text)
        now, then, before = averages[12], averages[int(back_to)], averages[11]
        assert bit_equal(now, then) or not self.average_first
        assert _distance(now, then) < _distance(now, before)
        assert all(tensor.isfinite().all() for tensor in seen.weights.values())


def _distance(these: list[Tensor], those: list[Tensor]) -> float:
    return sum(float((a - b).norm()) for a, b in zip(these, those, strict=True))


class AverageBehind(AverageBeside):
    """The same with the average behind the guard in the list of callbacks."""

    average_first = False
