"""How guards against divergence do on the same faults: ``python -m tests.benchmarks.divergence``, prints Markdown.

A small network learns scikit-learn's digits; a fault is put into the run, and each guard watches it. Lightning's are
used as they come, and SpikeDetection once more with a threshold for noisy losses and the run started again from its
last checkpoint without the batch, as its documentation says. ZClip is written from its formula (Kumar et al., 2025,
https://arxiv.org/abs/2504.02507).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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
from lightning_optim.divergence import ALARM_KINDS
from tests.benchmarks.healthy import KINDS
from tests.helpers import make_trainer

STEPS = 1000
AT = 500
SEEDS = 3
RESTARTS = 30
BATCH = 64
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


HEALTHY = ("GAN", "GAN, hinge", "REINFORCE")
"""Kinds of `tests.benchmarks.healthy`: nothing is wrong, and a guard should do nothing."""

ALARMS = ("nonfinite", "spike", "jump", "slow_divergence", "collapsed")
"""What of DivergenceGuard's report is about the run, not about single parameters."""


class Digits(L.LightningModule):
    """A perceptron, its fault, and the losses it has seen, without the factor of the fault."""

    def __init__(self, fault: Callable[[int], float], rate: Callable[[int], float], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
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
        start = len(self.losses)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)
        return [optimizer], [
            {
                "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: self.rate(start + k)),
                "interval": "step",
            }
        ]


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

    def __init__(self, **thresholds: float) -> None:
        super().__init__(exclude_batches_path=tempfile.mkdtemp(), **thresholds)


class Restarts(Spike):
    """For losses that are noisy, and with a checkpoint every 100 steps, from which `run` goes on without the batch."""

    def __init__(self) -> None:
        super().__init__(rtol=5.0, atol=1.0)
        self.checkpoint: tuple[int, dict[str, Tensor]] = (0, {})

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Keep a checkpoint."""
        if len(pl_module.losses) % 100 == 0:
            self.checkpoint = len(pl_module.losses), copy.deepcopy(pl_module.state_dict())


class Stop(EarlyStopping):
    """Lightning's, at the end of each epoch."""

    def __init__(self) -> None:
        super().__init__("train_loss", patience=10**6, check_finite=True, check_on_train_epoch_end=True)


GUARDS: dict[str, Callable[[], L.Callback] | None] = {
    "none": None,
    "SpikeDetection": Spike,
    "SpikeDetection, restarted": Restarts,
    "EarlyStopping(check_finite)": Stop,
    "ZClip": ZClip,
    "DivergenceGuard": lo.DivergenceGuard,
}


@dataclass
class Outcome:
    """What came of a run.

    Args:
        detected: Whether the guard did something at the fault or after it.
        false_alarms: How often it did before the fault, or without one.
        lost: Good steps not taken as they were: skipped, clipped, taken back, or after an end too early.
        loss: The mean of the last 50 losses that were seen.
    """

    detected: bool
    false_alarms: int
    lost: int
    loss: float


def run(fault: str, guard: str, seed: int) -> Outcome:
    """One run with one guard."""
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed + 1))
    model = Digits(FAULTS.get(fault, FAULTS["none"]), RATES.get(fault, lambda k: 1.0), seed)
    make = GUARDS[guard]
    callbacks = [] if make is None else [make()]
    acted: list[int] = []
    lost = 0
    while len(model.losses) < STEPS and len(acted) < RESTARTS:
        left = STEPS - len(model.losses)
        trainer = make_trainer(callbacks, max_steps=left, max_epochs=-1, default_root_dir=tempfile.mkdtemp())
        with contextlib.suppress(TrainingSpikeException):
            trainer.fit(model, loader)
        if len(model.losses) == STEPS:
            break
        acted.append(len(model.losses) - 1)
        if not isinstance(callbacks[0], Restarts):
            break
        step, weights = callbacks[0].checkpoint
        lost += len(model.losses) - step
        model.load_state_dict(weights)
    lost += STEPS - len(model.losses)
    for callback in callbacks:
        if isinstance(callback, lo.DivergenceGuard):
            told = [e for e in callback.report.entries if e.kind in ALARMS]
            acted += sorted({entry.step for entry in told})
            skipped = [e.step for e in told if ALARM_KINDS[e.kind].skip_suffices]
            lost += len({at for at in skipped if not is_bad(fault, at)})
            back = [e for e in callback.report.entries if e.text.startswith("back to")]
            lost += sum(max(0, min(e.step, AT) - int(re.findall(r"after step (\d+)", e.text)[0])) for e in back)
        elif isinstance(callback, Told):
            acted += callback.steps
            lost += sum(not is_bad(fault, step) for step in callback.steps)
    rightly = [step for step in acted if fault != "none" and step >= AT]
    losses = [float(loss) for loss in model.losses[-50:]]
    return Outcome(bool(rightly), len(acted) - len(rightly), lost, sum(losses) / len(losses))


def is_bad(fault: str, step: int) -> bool:
    """Whether the step itself is faulty."""
    return FAULTS.get(fault, FAULTS["none"])(step) != 1.0 or RATES.get(fault, lambda k: 1.0)(step) != 1.0


class LogLoss(L.Callback):
    """Logs the loss of each backward pass, which EarlyStopping looks at."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Log it."""
        pl_module.log("train_loss", loss.detach(), on_step=False, on_epoch=True)


def run_healthy(kind: str, guard: str, seed: int) -> Outcome:
    """Train a healthy run of `tests.benchmarks.healthy` with one guard; its loss is the metric of the run."""
    torch.manual_seed(seed)
    module, make = KINDS[kind](seed), GUARDS[guard]
    callbacks = [LogLoss()] if make is None else [LogLoss(), make()]
    trainer = make_trainer(callbacks, max_epochs=1, log_every_n_steps=module.every, default_root_dir=tempfile.mkdtemp())
    ended = 0
    try:
        trainer.fit(module)
    except (TrainingSpikeException, KeyError):  # Lightning's SpikeDetection wants outputs of manual optimization too.
        ended = 1
    acted, lost = ended, ended * (module.steps - trainer.fit_loop.epoch_loop.batch_idx)
    for callback in callbacks:
        if isinstance(callback, lo.DivergenceGuard):
            told = [entry for entry in callback.report.entries if entry.kind in ALARMS]
            acted += len({entry.step for entry in told})
            lost += callback.skipped_steps
        elif isinstance(callback, Told):
            acted += len(callback.steps)
            lost += len(callback.steps)
    torch.manual_seed(seed)
    module.eval()
    with torch.no_grad():
        return Outcome(False, acted, lost, module.score())


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| fault | guard | detected | false alarms | good steps lost | final loss, or metric of a healthy run |")
    print("|---|---|---|---|---|---|")
    for fault in (*FAULTS, *RATES, *HEALTHY):
        for guard in GUARDS:
            if fault in HEALTHY and GUARDS[guard] is Restarts:  # It keeps checkpoints of `Digits` only.
                continue
            train = run_healthy if fault in HEALTHY else run
            runs = [train(fault, guard, seed) for seed in range(SEEDS)]
            nothing = fault == "none" or guard == "none" or fault in HEALTHY
            found = "-" if nothing else f"{sum(r.detected for r in runs)} of {SEEDS}"
            wrong, lost, loss = (
                sum(float(getattr(r, name)) for r in runs) / SEEDS for name in ("false_alarms", "lost", "loss")
            )
            print(f"| {fault} | {guard} | {found} | {wrong:.3g} | {lost:.3g} | {loss:.3g} |", flush=True)


if __name__ == "__main__":
    main()
