"""A schedule that reduces the learning rate when a metric stops improving."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim.core.durations import Duration
from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import typed
from lightning_optim.schedules.base import Position, Schedule
from lightning_optim.schedules.phases import Cooldown, Warmup


@typed
class ReduceOnPlateau(Schedule):
    """Reduction of the peak by ``factor`` whenever ``monitor`` has not improved for ``patience`` observations.

    Under Lightning the metric is observed after each validation; at the end of each epoch where nothing is validated,
    where ``monitor`` is logged in training, or where no callback of ours is on the Trainer. In a plain loop whenever
    [`Scheduler.observe`][lightning_optim.schedules.Scheduler.observe] is called. Observations during the warmup do not
    count. The number of reductions, the best value and the used patience are saved with the scheduler.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        monitor: Name of the logged metric.
        mode: ``"min"`` if a lower value is better, ``"max"`` if a higher value is.
        factor: Multiplier from one level to the next, in (0, 1).
        patience: Number of observations without improvement that are tolerated; one more reduces the rates.
        threshold: Smallest improvement that counts, as a fraction of the best value.
        floor: Lowest multiplier of the peak.
        hold: Length of a phase after the warmup in which observations do not count either.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none. torch's ``cooldown`` is ``grace``.
        threshold_mode: ``"rel"`` if ``threshold`` is a fraction of the best value; ``"abs"`` if it is a difference.
        grace: Number of observations after a reduction that do not count towards ``patience``.
        min_lr: Lowest learning rate: of all groups, of each in their order, or by name (0 for those not named).
        eps: A reduction by no more than this learning rate is skipped.

    Raises:
        ValueError: An argument is out of its range.

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
        *,
        threshold_mode: str = "rel",
        grace: int = 0,
        min_lr: float | Sequence[float] | Mapping[str, float] = 0.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(warmup, hold, cooldown)
        if not monitor:
            raise ValueError(
                f"Invalid monitor={monitor!r} of ReduceOnPlateau: must be the name of a logged metric, for instance "
                "'val_loss'."
            )
        if mode not in ("min", "max"):
            raise ValueError(f"Unknown mode={mode!r} of ReduceOnPlateau. {nearest(mode, ('min', 'max'))}")
        if not 0 < factor < 1:
            raise ValueError(f"Invalid factor={factor!r} of ReduceOnPlateau: must be in (0, 1), for instance 0.1.")
        if patience < 0:
            raise ValueError(f"Invalid patience={patience!r} of ReduceOnPlateau: must be at least 0.")
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"Invalid threshold={threshold!r} of ReduceOnPlateau: must be finite and at least 0.")
        if threshold_mode not in ("rel", "abs"):
            raise ValueError(
                f"Unknown threshold_mode={threshold_mode!r} of ReduceOnPlateau. "
                f"{nearest(threshold_mode, ('rel', 'abs'))}"
            )
        if grace < 0:
            raise ValueError(f"Invalid grace={grace!r} of ReduceOnPlateau: must be at least 0.")
        for name, rate in (("min_lr", min_lr), ("eps", eps)):
            given = rate.values() if isinstance(rate, Mapping) else rate if isinstance(rate, Sequence) else [rate]
            if not all(math.isfinite(each) and each >= 0 for each in given):
                raise ValueError(
                    f"Invalid {name}={rate!r} of ReduceOnPlateau: must be a learning rate, finite and at least 0."
                )
        if not 0 <= floor <= 1:
            raise ValueError(f"Invalid floor={floor!r} of ReduceOnPlateau: must be a multiplier of the peak in [0, 1].")
        self.monitor = monitor
        self.mode = mode
        self.factor = float(factor)
        self.patience = patience
        self.threshold = float(threshold)
        self.floor = float(floor)
        self.threshold_mode = threshold_mode
        self.grace = grace
        self.min_lr = min_lr
        self.eps = float(eps)

    def min_lr_of(self, index: int, name: str | None) -> float:
        """Return the lowest learning rate of a group.

        Args:
            index: Index of the group.
            name: Name of the group, or None.
        """
        if isinstance(self.min_lr, Mapping):
            return float(self.min_lr.get(str(index) if name is None else name, 0.0))
        if isinstance(self.min_lr, Sequence):  # A group added later has none.
            return float(self.min_lr[index]) if index < len(self.min_lr) else 0.0
        return float(self.min_lr)

    def check_groups(self, names: Sequence[str | None]) -> None:
        """Check that ``min_lr`` fits the groups.

        Args:
            names: Name of each group, or None for a group without a name.

        Raises:
            ValueError: ``min_lr`` has more or fewer values than there are groups, or names a group that does not exist.
        """
        if isinstance(self.min_lr, Mapping):
            known = [str(index) if name is None else name for index, name in enumerate(names)]
            for name in self.min_lr:
                if name not in known:
                    raise ValueError(f"{self}: min_lr names {name!r}, which is not a group. {nearest(name, known)}")
        elif isinstance(self.min_lr, Sequence) and len(self.min_lr) != len(names):
            raise ValueError(
                f"{self}: min_lr has {len(self.min_lr)} learning rates, but there are {len(names)} groups. Give one "
                "for all groups, one for each, or a mapping by name."
            )

    def shape(self, at: Position) -> float:
        """Return 1, which the level of `Plateau` multiplies."""
        return 1.0


@dataclass
class Plateau:
    """State of a `ReduceOnPlateau`, by the criterion of torch's ``ReduceLROnPlateau``.

    Args:
        schedule: The schedule.
        reductions: Number of reductions so far.
        best: The best value so far; None before the first.
        bad: Number of observations without improvement since then.
        grace: Number of coming observations that do not count.
    """

    schedule: ReduceOnPlateau
    reductions: int = 0
    best: float | None = None
    bad: int = 0
    grace: int = 0

    @property
    def level(self) -> float:
        """Present multiplier of the peak, without the effects of the schedule's `min_lr` and `eps`."""
        return max(self.schedule.factor**self.reductions, self.schedule.floor)

    def rate(self, peak: float, min_lr: float) -> float:
        """Compute the reduced learning rate of a group.

        Args:
            peak: Peak learning rate of the group.
            min_lr: Lowest learning rate of the group.
        """
        rate, lowest = peak, max(min_lr, peak * self.schedule.floor)
        for _ in range(self.reductions):
            lower = max(rate * self.schedule.factor, lowest)
            if rate - lower <= self.schedule.eps:  # As in torch, there is no further reduction.
                break
            rate = lower
        return rate

    def observe(self, value: float) -> None:
        """Update the state with a new value of the metric."""
        if self._is_better(value):
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        if self.grace > 0:
            self.grace -= 1
            self.bad = 0
        if self.bad > self.schedule.patience:
            self.reductions += 1
            self.grace = self.schedule.grace
            self.bad = 0

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        less, threshold = self.schedule.mode == "min", self.schedule.threshold
        if self.schedule.threshold_mode == "rel":
            limit = self.best * (1 - threshold if less else 1 + threshold)
        else:
            limit = self.best - threshold if less else self.best + threshold
        return value < limit if less else value > limit

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        return {"reductions": self.reductions, "best": self.best, "bad": self.bad, "grace": self.grace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`; that of version 0.1 has the level instead of `reductions`."""
        self.best, self.bad, self.grace = state["best"], state["bad"], state.get("grace", 0)
        self.reductions = state["reductions"] if "reductions" in state else self._reductions_to(state["level"])

    def _reductions_to(self, level: float) -> int:
        """Return the number of reductions from 1 to ``level``."""
        lowest = max(level, self.schedule.floor) * (1 + 1e-9)  # The level was a product, with rounding errors.
        return next(n for n in itertools.count() if self.schedule.factor**n <= lowest)


class Observer(LRScheduler):
    """Adapter that passes a metric to a `Scheduler`, because Lightning gives metrics to schedulers only.

    Args:
        scheduler: A `Scheduler` of a `ReduceOnPlateau`.
    """

    def __init__(self, scheduler: Any) -> None:  # LRScheduler's constructor is not called, because it takes a step.
        self.optimizer = scheduler.optimizer
        self.scheduler = scheduler
        self.is_idle = False
        """Whether `step` does nothing, because somebody else calls `look` after each validation."""

    def step(self, metric: Any = None) -> None:
        """Observe the metric at the end of an epoch.

        Args:
            metric: A number or a tensor of shape [].
        """
        if not self.is_idle and metric is not None:
            self.look(metric)

    def look(self, metric: Any) -> None:
        """Observe the metric, averaged over ranks, so that all of them decide alike.

        Args:
            metric: A number or a tensor of shape [].
        """
        value = metric.detach().clone() if isinstance(metric, Tensor) else torch.tensor(float(metric), device="cpu")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(value)
            value = value / torch.distributed.get_world_size()
        self.scheduler.observe(float(value))

    def get_lr(self) -> list[Any]:
        """Return the learning rate of each group, as set by the scheduler."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[Any]:
        """Return the learning rate of each group, as set by the scheduler."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, because the scheduler saves the observations."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing, because there is no state."""
