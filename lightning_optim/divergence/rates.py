"""The learning rates of a run so far: whether the present one is new to it."""

from __future__ import annotations

import math
from collections import deque

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.core.stateful import Stateful

_RECENT = 32
"""Number of last steps whose rates are compared with all rates before them."""
_RISE = 1.5
"""Factor above the highest rate so far that is new; a warmup of hundreds of steps rises by less in 32 of them."""


class RateHistory(Stateful):
    """Learning rates of the steps so far.

    A rate that the run has had before is familiar: a warm restart returns to one. A rate far above all of them may make
    the weights worse from one step to the next.

    Example:
        >>> history = RateHistory()
        >>> for rate in [0.1] * 100 + [0.01] * 100 + [0.1]:
        ...     history.update(rate)
        >>> history.has_risen
        False
        >>> for rate in [3.0] * 100:
        ...     history.update(rate)
        >>> history.distrust()  # It has led to a divergence.
        >>> history.update(3.0)
        >>> history.has_risen
        True
    """

    STATE = ("recent", "highest", "before_rise")

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._highest = 0.0
        self._before_rise: float | None = None

    def update(self, rate: float) -> None:
        """Add the rate of a step; NaN, for one that is not known, is ignored."""
        if not math.isfinite(rate):
            return
        had_risen = self.has_risen
        if len(self._recent) == _RECENT:
            self._highest = max(self._highest, self._recent[0])
        self._recent.append(rate)
        if self.has_risen and not had_risen:
            self._before_rise = self._highest

    def distrust(self) -> None:
        """Forget the rates since the last rise, because the weights became worse there."""
        if self._before_rise is not None:
            self._highest = self._before_rise
            self._recent.clear()

    @property
    def has_risen(self) -> bool:
        """Whether one of the last rates is far above all those before them."""
        return self._highest > 0 and max(self._recent, default=0.0) > _RISE * self._highest


def highest_lr(optimizer: Optimizer) -> float:
    """Return the highest learning rate of the groups of an optimizer; NaN if the device has to be asked."""
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return math.nan
    return max(map(float, rates), default=math.nan)
