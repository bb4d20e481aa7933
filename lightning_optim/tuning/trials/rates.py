"""The learning rates of a trial: all groups of one optimizer in their ratios, under the shape of the real schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lightning_optim.core.durations import Horizon
from lightning_optim.schedules import Scheduler
from lightning_optim.schedules.hyperparameters import LR

Curve = Callable[[int], float]
"""A factor on the peak rates as a function of the trial's step."""

WARMUP = 0.1
"""Share of a trial in which rates rise linearly where the real schedule cannot be evaluated ahead."""


class Peaks:
    """The peak rates of an optimizer's groups, as configured; a trial sets multiples of them.

    Args:
        optimizer: The optimizer, without wrappers.
        scheduler: Its scheduler; None if it has none.
        horizon: Length of the run. A scheduler asks for it before its first step, which is after the trials.

    Raises:
        MisconfigurationException: All rates are 0.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Any, horizon: Horizon | None = None) -> None:
        self.optimizer, self._scheduler, self._horizon = optimizer, scheduler, horizon
        self._groups = optimizer.param_groups
        self._peaks = peak_rates(optimizer, scheduler)
        if not self.base > 0:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} has lr={self.base:g}, and trials set multiples of the configured rate. "
                "Configure a rate above 0, which may be any, and a warmup as a scheduler."
            )

    @property
    def base(self) -> float:
        """The rate that the others are multiples of: the optimizer's own ``lr`` if a group has it, or the largest.

        A group whose rate is a multiple of the configured one has that in its own peak.
        """
        return max(self._peaks) if (own := self._own()) not in self._peaks else own

    def _own(self) -> float:
        return float(self.optimizer.defaults.get("lr", 0.0))

    def scale(self, factor: float) -> None:
        """Multiply the peaks in the groups, of which rules of the optimizer may be told: decay without the schedule's.

        Args:
            factor: The factor, on what is in the groups now.
        """
        scale_peaks(self._groups, factor)

    def rates(self) -> list[float]:
        """Return the present rate of each group."""
        return [float(group["lr"]) for group in self._groups]

    def set_rates(self, factors: Sequence[float]) -> None:
        """Set the rates of the next step.

        Args:
            factors: For each group, its rate over its peak.
        """
        for group, peak, factor in zip(self._groups, self._peaks, factors, strict=True):
            LR.write(group, peak * factor)

    def curves(self, steps: int) -> list[Curve]:
        """Return each group's schedule, over the length of a trial in place of the run's.

        A schedule that follows a metric, is of another library or has no known length counts as constant after a
        linear warmup over a tenth of the trial.

        Args:
            steps: Length of the trial.
        """
        scheduler = self._scheduler
        if not isinstance(scheduler, Scheduler):
            return [_warmup(steps)] * len(self._groups)
        horizon = scheduler.horizon or self._horizon
        if horizon is None or not horizon.total_steps:
            return [_warmup(steps)] * len(self._groups)
        return [_over(multiplier, horizon.total_steps, steps) for multiplier in scheduler.multipliers(horizon)]


def peak_rates(optimizer: Optimizer, scheduler: Any) -> list[float]:
    """Return the rate of each group that its schedule is a multiple of; where torch's has a highest one, that.

    Args:
        optimizer: The optimizer, without wrappers.
        scheduler: Its scheduler; None if it has none.
    """
    groups = optimizer.param_groups
    first = next(parts_of(scheduler), None)
    if isinstance(first, OneCycleLR):
        return [float(group["max_lr"]) for group in groups]
    if isinstance(first, CyclicLR):
        return [float(rate) for rate in first.max_lrs]
    return [float(group.get("initial_lr", group["lr"])) for group in groups]


def parts_of(scheduler: Any) -> Iterator[Any]:
    """Yield the schedulers that one is composed of, as torch's `SequentialLR` and `ChainedScheduler` are; or itself.

    Args:
        scheduler: A scheduler; None for nothing.
    """
    parts = getattr(scheduler, "_schedulers", None)
    if isinstance(parts, list | tuple):
        for part in parts:
            yield from parts_of(part)
    elif scheduler is not None:
        yield scheduler


def scale_peaks(groups: Sequence[dict[str, Any]], factor: float) -> None:
    """Multiply what groups have of their schedule: the rate at its start, the highest and, in `OneCycleLR`, the lowest.

    Args:
        groups: Parameter groups.
        factor: The factor.
    """
    for group in groups:
        keys = ("initial_lr", "peak_lr", *(("max_lr", "min_lr") if "max_lr" in group else ()))
        for key in keys:
            if key in group:
                group[key] = group[key] * factor


def _over(curve: Callable[[float], float], total: int, steps: int) -> Curve:
    return lambda step: curve((step + 0.5) * total / steps)


def _warmup(steps: int) -> Curve:
    warmup = max(round(WARMUP * steps), 1)
    return lambda step: min((step + 1) / warmup, 1.0)
