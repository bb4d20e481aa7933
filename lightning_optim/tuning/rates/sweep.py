"""The rates of a range test, and when to end it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["Divergence", "exponential", "until_divergence"]

_WINDOW = 5
"""Losses in a median; one batch, or two, that are far off do not move it."""

_NOISES = 6.0
"""Rise over the start, in standard deviations of one loss. A median of five has 0.54 of it, the start a third."""

_LEAST = 10
"""Losses before a rise ends the sweep; fewer do not tell noise from a rise."""


def exponential(low: float, high: float, steps: int) -> list[float]:
    """Return rates that grow by the same factor from step to step.

    Args:
        low: First rate, above 0.
        high: Last rate, above ``low``.
        steps: Number of rates, at least 2.

    Raises:
        ValueError: A value is out of its range.

    Example:
        >>> exponential(0.001, 1.0, 4)
        [0.001, 0.01, 0.1, 1.0]
    """
    if not 0 < low < math.inf:
        raise ValueError(f"Invalid low={low!r}: must be a finite rate above 0.")
    if not low < high < math.inf:
        raise ValueError(f"Invalid high={high!r}: must be a finite rate above low={low!r}.")
    if steps < 2:
        raise ValueError(f"Invalid steps={steps!r}: must be at least 2.")
    decades = math.log10(high / low) / (steps - 1)
    rates = [low * 10 ** (decades * step) for step in range(steps)]
    rates[-1] = float(high)
    return [float(f"{rate:.12g}") for rate in rates]


class Divergence:
    """Decides from the losses so far whether a sweep has gone too far.

    A sweep ends at a loss that is not finite twice in a row, or where the median of the last five losses lies above the
    level of the start by more than the descent so far and by more than noise explains. Levels and noise are differences
    of losses, so that the decision is the same for ``c * loss + d`` with c > 0, losses below zero included.

    Example:
        >>> divergence = Divergence()
        >>> [divergence.update(loss) for loss in (1.0, 0.9, float("nan"))]
        [None, None, None]
        >>> divergence.update(float("inf"))
        'two losses in a row are not finite'
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._last: deque[float] = deque(maxlen=_WINDOW)
        self._best = math.inf
        self._unfinite = 0

    def update(self, loss: float) -> str | None:
        """Take the loss of a step, and return the reason to end, or None to continue.

        Args:
            loss: Loss of the step, before its update.
        """
        if not math.isfinite(loss):
            self._unfinite += 1
            return "two losses in a row are not finite" if self._unfinite >= 2 else None
        self._unfinite = 0
        self._losses.append(loss)
        self._last.append(loss)
        if len(self._last) < _WINDOW:
            return None
        level = float(np.median(self._last))
        # Where the first rates are too high already, the first five losses know a lower start.
        start = min(float(np.median(self._losses[:_LEAST])), float(np.median(self._losses[:_WINDOW])))
        self._best = min(self._best, level)
        if len(self._losses) < _LEAST + _WINDOW:
            return None
        # Differences of neighbours hold the noise and hardly the slow change; rounding is all there is where a loss
        # without noise has not moved yet.
        noise = 1.4826 * float(np.median(np.abs(np.diff(self._losses[:-_WINDOW])))) / math.sqrt(2)
        rounding = 1e-4 * float(np.max(np.abs(self._losses[:_LEAST])))
        if level - start > max(start - self._best, _NOISES * noise, rounding):
            return "the loss has risen above its start by more than it had fallen"
        return None


def until_divergence() -> Callable[[Sequence[float]], bool]:
    """Return what decides from its losses so far, asked at each step, whether a trial has diverged; one for each."""
    divergence = Divergence()
    return lambda losses: divergence.update(losses[-1]) is not None
