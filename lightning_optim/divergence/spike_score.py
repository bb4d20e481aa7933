"""The spike score: which share of the steps of a run were spikes, one number by which runs are compared."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_optim.divergence.observation import SIGNALS

_TO_SIGMA = 1.4826
"""Standard deviation over median absolute deviation, for a normal distribution."""


class SpikeScore:
    """Share of the steps whose loss, or gradient norm, is far above the last ones.

    A value v counts as a spike if, with x = log v, the median and σ = 1.4826 · MAD over the last ``window`` values,

        (x − median) / σ > sigmas    and    v > (1 + min_rise) · median of v

    The first ``warmup`` values are not judged. A signal with values of 0 or below in its window is judged without the
    logarithm. Values that are not finite are left out: they are counted as skipped steps. All others enter the window,
    also those of skipped steps, so that the score does not depend on what a guard does about them, and a new level ends
    to count after half a window.

    After the spike score of OLMo 2 (https://arxiv.org/abs/2501.00656), the share of values several standard deviations
    away from the mean of the last 1000. Median and MAD are used instead, because a spike moves mean and standard
    deviation and so hides the next one, and the logarithm, because a loss falls in the course of a run.

    Args:
        signals: Names of the signals.
        sigmas: Number of σ above the median, above 0.
        min_rise: Smallest rise above the median in addition, as a share of it: a constant signal has no spread.
        window: Number of values that are kept.
        warmup: Number of values that are not judged.

    Attributes:
        spikes: Number of spikes so far, by signal.
        steps: Number of values judged so far, by signal.

    Example:
        >>> score = SpikeScore(("loss",), warmup=4)
        >>> for loss in (1.0, 1.1, 0.9, 1.0, 1.1, 9.0, 1.0, 0.9):
        ...     score.update({"loss": loss})
        >>> score.shares()
        {'loss': 0.25}
    """

    def __init__(
        self,
        signals: Sequence[str] = SIGNALS,
        sigmas: float = 6.0,
        min_rise: float = 0.1,
        window: int = 128,
        warmup: int = 64,
    ) -> None:
        self._sigmas, self._min_rise, self._window, self._warmup = sigmas, min_rise, window, warmup
        self.spikes = dict.fromkeys(signals, 0)
        self.steps = dict.fromkeys(signals, 0)
        self._values: dict[str, deque[float]] = {signal: deque(maxlen=window) for signal in signals}
        self._sorted: dict[str, list[float]] = {signal: [] for signal in signals}

    def update(self, values: Mapping[str, float]) -> None:
        """Judge the values of a step, and add them to the windows.

        Args:
            values: Value of each signal; NaN for one that is not known.
        """
        for signal, recent in self._values.items():
            value, ordered = values[signal], self._sorted[signal]
            if not math.isfinite(value):
                continue
            if len(ordered) >= self._warmup:
                self.steps[signal] += 1
                self.spikes[signal] += self._is_spike(value, ordered)
            if len(recent) == recent.maxlen:
                del ordered[bisect_left(ordered, recent[0])]
            recent.append(value)
            insort(ordered, value)

    def shares(self) -> dict[str, float]:
        """Return the spike score of each signal of which a value has been judged, in [0, 1]."""
        return {signal: self.spikes[signal] / steps for signal, steps in self.steps.items() if steps}

    def _is_spike(self, value: float, ordered: Sequence[float]) -> bool:
        """Return whether the value is beyond the limit, without computing it.

        The MAD is below a radius if more than half of the values are nearer to the median than that. Counting them in
        the sorted window takes two bisections, computing the MAD a sort.
        """
        middle = (len(ordered) - 1) // 2
        median = ordered[middle]
        if not value > median + self._min_rise * abs(median):
            return False
        if ordered[0] > 0:
            radius = (math.log(value) - math.log(median)) / (self._sigmas * _TO_SIGMA)
            low, high = median * math.exp(-radius), median * math.exp(radius)
        else:
            radius = (value - median) / (self._sigmas * _TO_SIGMA)
            low, high = median - radius, median + radius
        return bisect_left(ordered, high) - bisect_right(ordered, low) > middle

    def state_dict(self) -> dict[str, Any]:
        """Return counts and windows, as plain numbers and lists."""
        values = {signal: list(recent) for signal, recent in self._values.items()}
        return {"spikes": dict(self.spikes), "steps": dict(self.steps), "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.spikes, self.steps = dict(state["spikes"]), dict(state["steps"])
        self._values = {signal: deque(values, maxlen=self._window) for signal, values in state["values"].items()}
        self._sorted = {signal: sorted(recent) for signal, recent in self._values.items()}
