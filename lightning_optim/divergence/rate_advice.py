"""Advice on the learning rate: whether the steps of the last inspections show that it is too high or too low."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

from lightning_optim.core.stateful import Stateful
from lightning_optim.divergence.health_limits import HealthLimits

_INSPECTIONS = 5
"""Number of inspections that advice is based on."""
_APART = 10
"""Smallest number of steps between two of these, as measured: gradients of neighbouring steps are much alike."""
_EARLY = 200
"""Number of steps in which the gradients of good runs point along the momentum as well: the way down is long."""
_USUAL_RATIO = 0.01
"""Share of the weights below which an update is no sign of a high learning rate."""
NEAR_PEAK = 0.1
"""Share of its highest learning rate below which a schedule is near its end, so that small updates are intended."""


class RateAdvice(Stateful):
    """Advice on the learning rate of one optimizer, from its last inspections.

    Args:
        limits: Limits beyond which the rate is reported: ``high_ratio``, ``low_ratio``, ``against`` and ``along``.
    """

    # These are keys in checkpoints, and so stay: `looked` is the step of the last inspection that counted.
    STATE = ("ratios", "cosines", "rates", "looked")

    def __init__(self, limits: HealthLimits) -> None:
        self.limits = limits
        self._ratios: deque[float] = deque(maxlen=_INSPECTIONS)
        self._cosines: deque[float] = deque(maxlen=_INSPECTIONS)
        self._rates: deque[float] = deque(maxlen=_INSPECTIONS)
        self._looked = -_APART

    def update(
        self, step: int, total: Mapping[str, float], lr: float, peak: float, rounds_away: bool
    ) -> dict[str, str]:
        """Add an inspection, unless the last one is too near.

        Args:
            step: Number of optimizer steps so far.
            total: Sum of each statistic over all tensors, by the names of `TENSOR_COLUMNS`; NaN where the rule has no
                such quantity.
            lr: Highest learning rate of the groups.
            peak: The highest one so far.
            rounds_away: Whether updates are small because rounding takes them, and not the learning rate.

        Returns:
            The text of ``lr_too_high`` or ``lr_too_low``; empty if neither is shown.
        """
        if step < self._looked + _APART:
            return {}
        self._looked = step
        limits = self.limits
        if total["param_sq"] > 0:
            self._ratios.append(math.sqrt(total["update_sq"] / total["param_sq"]))
        if (scale := total["clipped_sq"] * total["momentum_sq"]) > 0:
            self._cosines.append(total["grad_exp_avg"] / math.sqrt(scale))
        self._rates.append(lr)
        steady = self._rates[-1] <= self._rates[0] and self._rates[-1] >= NEAR_PEAK * peak  # A warmup is not steady.
        ratios = self._ratios if len(self._ratios) == _INSPECTIONS else None
        cosine = statistics.fmean(self._cosines) if len(self._cosines) == _INSPECTIONS else 0.0
        too_high = "the learning rate may be too high"
        too_low = "the learning rate may be too low, which a trial can tell (lightning-optim find-lr --method check)"
        if ratios and min(ratios) > limits.high_ratio:
            return {
                "lr_too_high": f"steps change the weights by more than {limits.high_ratio:g} of their norm: {too_high}"
            }
        if cosine < limits.against and max(self._cosines) < limits.against / 2:
            return {"lr_too_high": f"gradients point against the momentum, so the steps oscillate: {too_high}"}
        if not (ratios and steady):
            return {}
        if max(ratios) < limits.low_ratio and not rounds_away:
            return {
                "lr_too_low": f"steps change the weights by less than {limits.low_ratio:g} of their norm: {too_low}"
            }
        goes_on = cosine > 0 and min(self._cosines) > limits.along
        if step >= _EARLY and max(ratios) < _USUAL_RATIO and goes_on:
            text = "gradients keep pointing along the momentum, so longer steps would still descend"
            return {"lr_too_low": f"{text}: {too_low}"}
        return {}
