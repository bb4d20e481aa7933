"""Rates set in the optimizers of a fit as if they had been configured so."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from torch.optim import Optimizer

from lightning_optim.callbacks._followed import bare
from lightning_optim.schedules import Scheduler
from lightning_optim.schedules.hyperparameters import LR
from lightning_optim.tuning.trials.rates import Peaks


def rate_of(trainer: L.Trainer, place: int) -> float:
    """Return the base rate of an optimizer, at the peak of its schedule.

    Args:
        trainer: A Trainer that fits.
        place: Place of the optimizer among the Trainer's.
    """
    return Peaks(*_parts(trainer, place)).base


def set_rate(trainer: L.Trainer, place: int, lr: float) -> None:
    """Set the base rate of an optimizer; its groups keep their ratios, and its schedule goes on from there.

    Args:
        trainer: A Trainer that fits.
        place: Place of the optimizer among the Trainer's.
        lr: The base rate at the peak of the schedule.
    """
    optimizer, scheduler = _parts(trainer, place)
    factor = lr / Peaks(optimizer, scheduler).base
    if isinstance(scheduler, Scheduler):
        scheduler.scale_peaks(factor)
        return
    for group in optimizer.param_groups:
        LR.write(group, group["lr"] * factor)
        for key in ("initial_lr", "peak_lr"):
            if key in group:
                group[key] = group[key] * factor
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


def _parts(trainer: L.Trainer, place: int) -> tuple[Optimizer, Any]:
    optimizer = bare(trainer.optimizers[place])
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return optimizer, next((each for each in schedulers if getattr(each, "optimizer", None) is optimizer), None)
