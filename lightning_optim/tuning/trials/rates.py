"""The learning rates of a trial: all groups of one optimizer in their ratios, under the shape of the real schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

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
    """

    def __init__(self, optimizer: Optimizer, scheduler: Any, horizon: Horizon | None = None) -> None:
        self.optimizer, self._scheduler, self._horizon = optimizer, scheduler, horizon
        self._groups = optimizer.param_groups
        self._peaks = [float(group.get("initial_lr", group["lr"])) for group in self._groups]

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
        for group in self._groups:
            if "initial_lr" in group:
                group["initial_lr"] = group["initial_lr"] * factor
            if "peak_lr" in group:
                group["peak_lr"] *= factor

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


def _over(curve: Callable[[float], float], total: int, steps: int) -> Curve:
    return lambda step: curve((step + 0.5) * total / steps)


def _warmup(steps: int) -> Curve:
    warmup = max(round(WARMUP * steps), 1)
    return lambda step: min((step + 1) / warmup, 1.0)
