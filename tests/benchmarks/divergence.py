"""How guards against divergence do on the same faults: ``python -m tests.benchmarks.divergence``, prints Markdown.

A small network learns scikit-learn's digits; a fault is put into the run, and each guard watches it. Lightning's are
used as they come, ZClip is written from its formula (Kumar et al., 2025, https://arxiv.org/abs/2504.02507).
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.spike import SpikeDetection
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from tests.helpers import make_trainer

STEPS = 600
AT = 300
FAULTS: dict[str, Callable[[int], float]] = {
    "none": lambda k: 1.0,
    "NaN once": lambda k: math.nan if k == AT else 1.0,
    "x10 once": lambda k: 10.0 if k == AT else 1.0,
    "x1000 once": lambda k: 1000.0 if k == AT else 1.0,
    "NaN, then x1000": lambda k: math.nan if k == AT else 1000.0 if k == AT + 20 else 1.0,
    "x1.5 from then on": lambda k: 1.5 if k >= AT else 1.0,
}
RATES: dict[str, Callable[[int], float]] = {
    "rate x30 from then on": lambda k: 30.0 if k >= AT else 1.0,
}


ALARMS = ("nonfinite", "spike", "jump", "slow_divergence")
"""What of DivergenceGuard's report is about the run, not about single parameters."""


class Digits(L.LightningModule):
    """A perceptron, its fault, and the losses it has seen, without the factor of the fault."""

    def __init__(self, fault: Callable[[int], float], rate: Callable[[int], float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        self.net, self.fault, self.rate = nn.Sequential(*layers), fault, rate
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss, faulty if it is time."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        loss = loss * self.fault(len(self.losses) - 1)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Return momentum and its rate."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate), "interval": "step"}]


class Told(L.Callback):
    """A guard of somebody else, and when it did something."""

    steps: list[int]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start afresh."""
        self.steps = []


class ZClip(Told):
    """z = (‖g‖ − μ) / σ; if z > 2.5, ‖g‖ is scaled to μ + 2.5² / z · σ, which also enters μ and σ (α = 0.97)."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Clip."""
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = float(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
        if len(self.warm) < 25:
            self.warm.append(norm)
            self.mean = sum(self.warm) / len(self.warm)
            self.var = sum((v - self.mean) ** 2 for v in self.warm) / len(self.warm)
            return
        std = math.sqrt(self.var)
        z = (norm - self.mean) / (std + 1e-6)
        if z > 2.5:
            self.steps.append(trainer.global_step)
            clipped = self.mean + 2.5**2 / z * std
            torch._foreach_mul_(grads, clipped / (norm + 1e-6))
            norm = clipped
        self.mean = 0.97 * self.mean + 0.03 * norm
        self.var = 0.97 * self.var + 0.03 * (norm - self.mean) ** 2

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start afresh."""
        super().on_fit_start(trainer, pl_module)
        self.warm: list[float] = []


class Spike(SpikeDetection):
    """Lightning's, whose file goes away."""

    def __init__(self) -> None:
        super().__init__(exclude_batches_path=tempfile.mkdtemp())


class Stop(EarlyStopping):
    """Lightning's, at the end of each epoch."""

    def __init__(self) -> None:
        super().__init__("train_loss", patience=10**6, check_finite=True, check_on_train_epoch_end=True)


GUARDS: dict[str, Callable[[], L.Callback] | None] = {
    "none": None,
    "Lightning's SpikeDetection": Spike,
    "EarlyStopping(check_finite)": Stop,
    "ZClip": ZClip,
    "DivergenceGuard": lo.DivergenceGuard,
}


def run(fault: str, guard: str) -> tuple[bool, int, int, float]:
    """Whether it acted from the fault on, on how many steps before, how far it got, the mean of the last 50 losses."""
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    loader = DataLoader(data, 32, shuffle=True, generator=torch.Generator().manual_seed(1))
    model = Digits(FAULTS.get(fault, FAULTS["none"]), RATES.get(fault, lambda k: 1.0))
    make = GUARDS[guard]
    callbacks = [] if make is None else [make()]
    trainer = make_trainer(callbacks, max_steps=STEPS, max_epochs=-1, default_root_dir=tempfile.mkdtemp())
    stopped = None
    try:
        trainer.fit(model, loader)
    except TrainingSpikeException as exception:
        stopped = len(model.losses) - 1 if exception else None
    if trainer.global_step < STEPS and stopped is None:
        stopped = len(model.losses) - 1
    acted: list[int] = [] if stopped is None else [stopped]
    for callback in callbacks:
        if isinstance(callback, lo.DivergenceGuard):
            acted += sorted({entry.step for entry in callback.report.entries if entry.kind in ALARMS})
        elif isinstance(callback, Told):
            acted += callback.steps
    rightly = [step for step in acted if fault != "none" and step >= AT]
    losses = [float(loss) for loss in model.losses[-50:]]
    return bool(rightly), len(acted) - len(rightly), len(model.losses), sum(losses) / len(losses)


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    print("| fault | guard | noticed | acted before the fault | steps | final loss |")
    print("|---|---|---|---|---|---|")
    for fault in (*FAULTS, *RATES):
        for guard in GUARDS:
            noticed, wrong, steps, loss = run(fault, guard)
            said = "-" if fault == "none" or guard == "none" else "yes" if noticed else "no"
            print(f"| {fault} | {guard} | {said} | {wrong} | {steps} | {loss:.3g} |", flush=True)


if __name__ == "__main__":
    main()
