"""A schedule that falls when a metric stops getting better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim.durations import Duration
from lightning_optim.messages import nearest
from lightning_optim.schedules.base import Position, Schedule
from lightning_optim.schedules.phases import Cooldown, Warmup


class ReduceOnPlateau(Schedule):
    """The peak, multiplied by ``factor`` whenever ``monitor`` has not got better for ``patience`` looks.

    Under Lightning the metric is looked at once per epoch, after validation; in a plain loop whenever
    [`Scheduler.observe`][lightning_optim.schedules.Scheduler.observe] is called. What is seen during the warmup does
    not count. Levels, best value and patience are saved with the scheduler.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        monitor: Name of the logged metric.
        mode: ``"min"`` if less is better, else ``"max"``.
        factor: Multiplier from one level to the next, in (0, 1).
        patience: How many looks without a better value are tolerated; one more reduces.
        threshold: By what fraction of the best value a better one must differ from it.
        floor: Lowest multiplier of the peak.
        hold: How long what is seen does not count after the warmup, either.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.

    Raises:
        ValueError: Something is out of its range.

    Example:
        >>> state = Plateau(ReduceOnPlateau(patience=1, factor=0.5))
        >>> for loss in (2.0, 1.0, 1.0, 1.0):
        ...     state.observe(loss)
        >>> state.level
        0.5
    """

    shape_needs_total = False

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = 0,
        monitor: str = "val_loss",
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        floor: float = 0.0,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
    ) -> None:
        super().__init__(warmup, hold, cooldown)
        if not monitor:
            raise ValueError("ReduceOnPlateau needs monitor, the name of a logged metric, for instance 'val_loss'.")
        if mode not in ("min", "max"):
            raise ValueError(f"Unknown mode={mode!r} of ReduceOnPlateau. {nearest(mode, ('min', 'max'))}")
        if not 0 < factor < 1:
            raise ValueError(f"Invalid factor={factor!r} of ReduceOnPlateau: it lies in (0, 1), for instance 0.1.")
        if patience < 0:
            raise ValueError(f"Invalid patience={patience!r} of ReduceOnPlateau: it is at least 0.")
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"Invalid threshold={threshold!r} of ReduceOnPlateau: it must be finite and at least 0.")
        if not 0 <= floor <= 1:
            raise ValueError(f"Invalid floor={floor!r} of ReduceOnPlateau: a multiplier of the peak lies in [0, 1].")
        self.monitor = monitor
        self.mode = mode
        self.factor = float(factor)
        self.patience = patience
        self.threshold = float(threshold)
        self.floor = float(floor)

    def shape(self, at: Position) -> float:
        """Always 1; the level of `Plateau` multiplies it."""
        return 1.0


@dataclass
class Plateau:
    """What a `ReduceOnPlateau` has seen so far, as torch's ``ReduceLROnPlateau`` judges it.

    Args:
        schedule: The schedule.
        level: Multiplier of the peak at present.
        best: The best value so far; None before the first.
        bad: How many looks since.
    """

    schedule: ReduceOnPlateau
    level: float = 1.0
    best: float | None = None
    bad: int = 0

    def observe(self, value: float) -> None:
        """Takes in the metric's new value."""
        schedule = self.schedule
        if self._is_better(value):
            self.best, self.bad = value, 0
            return
        self.bad += 1
        if self.bad > schedule.patience:
            self.level = max(self.level * schedule.factor, schedule.floor)
            self.bad = 0

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        if self.schedule.mode == "min":
            return value < self.best * (1 - self.schedule.threshold)
        return value > self.best * (1 + self.schedule.threshold)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"level": self.level, "best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.level, self.best, self.bad = state["level"], state["best"], state["bad"]


class Observer(LRScheduler):
    """Passes a metric on to a scheduler: how Lightning, which hands metrics to schedulers only, reaches ours.

    Args:
        scheduler: A `Scheduler` of a `ReduceOnPlateau`.
    """

    def __init__(self, scheduler: Any) -> None:  # LRScheduler's own constructor takes a step
        self.optimizer = scheduler.optimizer
        self._scheduler = scheduler

    def step(self, metric: Any = None) -> None:
        """Takes in the metric, averaged over ranks: all must decide alike."""
        value = metric.detach().clone() if isinstance(metric, Tensor) else torch.tensor(float(metric), device="cpu")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(value)
            value = value / torch.distributed.get_world_size()
        self._scheduler.observe(float(value))

    def get_lr(self) -> list[Any]:
        """As the scheduler has set them."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[Any]:
        """As the scheduler has set them."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the scheduler saves what it has seen."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""
