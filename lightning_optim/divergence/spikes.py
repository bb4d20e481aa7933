"""Detection of spikes against the last accepted values by a robust z-score, and adoption of a new level."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_optim.core.typed import typed

_TOGETHER_FROM = 16
"""Number of accepted values before all signals together can be flagged."""
GAP = 8
"""Number of steps without a flag that ends a series of flags: a new level near the threshold is not always flagged."""
_HARMFUL = 0.4
"""Rise above the median below which a step is taken. Where there is little noise a loss stands out that is a tenth
higher, as with each doubling of a batch of negatives; it does no harm."""
_FAMILIAR = 50.0
"""Factor on the largest magnitude of the run up to which another one is familiar. Losses that join a run, labels that
become noisy and new data stay within it, because the first, untrained loss is high as well; late in training a batch
that is a thousand times as high does not."""
_FIRST = 8
_NOTHING = 1e-3
"""Share of the median of the first 8 values below which nothing is a spike: a loss that has been fitted to 0 spreads
without bound."""
_TO_SIGMA = 1.4826
"""Standard deviation over median absolute deviation, for a normal distribution."""


@typed
class SpikeWindow:
    """Limits above which values of several signals are spikes, each from its own last accepted values.

    With x = log v, the median and σ = 1.4826 · MAD over the last ``window`` accepted x of a signal, a value is flagged
    if

        (x − median) / σ > threshold    and    v > (1 + min_rise) · median of v

    All signals are flagged if each is above ``together`` times the highest of its last ``window`` accepted values.
    Where the spread is so wide that one signal alone is no evidence, as for the loss of small batches late in training,
    two at once are. This needs no spread, so it starts after 16 steps.

    No value is flagged that is not above the third highest of the window: where every fourth step is of another task,
    its losses are far from the median, and usual.

    The robust spread is not moved by a few spikes, the logarithm makes it relative to the level, and the smallest rise
    avoids flags in a nearly constant signal. A signal that has been 0 or below in the window, such as a log-likelihood
    of densities, is judged without the logarithm. ``patience`` consecutive flags (with gaps of less than 8 steps), of
    any signal, are a new level and not spikes: the windows move there, and the flags end. Values that are flagged or
    not finite never enter the window.

    A value is *familiar* up to 50 times the largest magnitude accepted in the whole run; the magnitude, because a loss
    may have been negative so far. A flagged one that is familiar does not have to be skipped a second time in a series,
    because the run has been through steps of that size, and because the first skip has not helped; see `StepGuard`.

    The state is on the host. On the device a step is compared with `alone` and `together`, which are a few numbers to
    upload; when the step has arrived on the host, `update` moves them.

    Args:
        signals: Number of signals.
        threshold: Number of σ above the median, above 0. OLMo-core skips at 6 of a mean and standard deviation, which
            NaN and spikes themselves move; 8 of the robust spread is about as rare on gradients with heavy tails.
        min_rise: Smallest rise above the median, as a share of it, at least 0.
        window: Number of accepted values that are kept.
        warmup: Number of accepted values before the first flag, from 2 to ``window``.
        patience: Number of consecutive flags after which the new level is adopted, at least 1.
        together: Multiple of its highest value that every signal has to reach at once, at least 1. On clean runs (a
            perceptron on scikit-learn's digits, batches of 32 and 128, and a character model) 2 gave less than one
            false alarm in 3000 steps, and found a loss ×10 in 37 % (batches of 32) and 68 % (128) of the steps, against
            3 % and 7 % without it.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> window = SpikeWindow(signals=1, warmup=4)
        >>> for value in (1.0, 1.1, 0.9, 1.0):
        ...     _ = window.update([value], flags=[False], accepted=True)
        >>> 1.05 > window.alone[0], 9.0 > window.alone[0]
        (False, True)
    """

    def __init__(
        self,
        signals: int,
        threshold: float = 8.0,
        min_rise: float = 0.1,
        window: int = 128,
        warmup: int = 64,
        patience: int = 16,
        together: float = 2.0,
    ) -> None:
        if signals < 1:
            raise ValueError(f"Invalid signals={signals!r}: must be a number of signals of at least 1.")
        if not (math.isfinite(threshold) and threshold > 0):
            raise ValueError(
                f"Invalid threshold={threshold!r}: must be a finite number of standard deviations above 0, for "
                "instance 8."
            )
        if not (math.isfinite(min_rise) and min_rise >= 0):
            raise ValueError(f"Invalid min_rise={min_rise!r}: must be a share of at least 0, for instance 0.1.")
        if not 2 <= warmup <= window:
            raise ValueError(
                f"Invalid warmup={warmup!r} with window={window!r}: must be at least 2 and at most the window, or "
                "nothing would ever be flagged."
            )
        if patience < 1:
            raise ValueError(f"Invalid patience={patience!r}: must be a whole number of at least 1, for instance 16.")
        if not together >= 1:
            raise ValueError(f"Invalid together={together!r}: must be a factor of at least 1, for instance 2.")
        self.threshold, self.min_rise, self.warmup, self.patience = threshold, min_rise, warmup, patience
        self._factor = together
        self._accepted = [_Accepted(window) for _ in range(signals)]
        self._flagged: deque[list[float]] = deque(maxlen=patience)
        self._flags = 0
        self._quiet = 0
        self._set_limits()

    alone: list[float]
    """Limit of each signal by itself; infinite while too few values are known."""
    together: list[float]
    """Limits of all signals together: a spike if each is above its own."""
    familiar: list[float]
    """Limit of each signal up to which the run has been through such values; 0 before the first."""
    harmful: list[float]
    """Limit of each signal below which a step is worth taking, though it stands out."""
    medians: list[float]
    """Median of each signal's accepted values; infinite before the first."""

    def update(self, values: Sequence[float], flags: Sequence[bool], accepted: bool, behind: int = 0) -> list[float]:
        """Add a step.

        Args:
            values: One value of each signal; NaN for a signal that is not known.
            flags: Whether each value was a spike.
            accepted: Whether the step was taken: values of a skipped one do not enter.
            behind: Number of further steps that have already been compared with the present limits. A new level is
                adopted that many flags earlier, because these steps will be flagged as well.

        Returns:
            Factor by which the level of each signal has moved; 0 where it has not.
        """
        enter = [accepted and math.isfinite(v) and not flag for v, flag in zip(values, flags, strict=True)]
        medians = self.medians
        for known, value, enters in zip(self._accepted, values, enter, strict=True):
            if enters:
                known.add(value)
                if len(known) == _FIRST and not known.start:
                    known.start = known.median
        if any(flags):
            self._flagged.append(list(values))
            self._flags, self._quiet = self._flags + 1, 0
        else:
            self._quiet += any(enter)  # A step skipped for another reason is no evidence.
            if self._quiet >= GAP:
                self._flags = 0
        levels = [0.0] * len(values)
        if self._flags and self._flags >= max(self.patience - behind, 1):
            in_a_row = list(self._flagged)[-self._flags :]
            levels = [self._move(i, [row[i] for row in in_a_row], median) for i, median in enumerate(medians)]
            self._flags = 0
        self._set_limits()
        return levels

    def _move(self, signal: int, flagged: list[float], median: float) -> float:
        """Move the window of a signal to the level of the flagged values, if that is above it; return the factor."""
        level = _lower_median(sorted(value if value == value else math.inf for value in flagged))
        if not (math.isfinite(level) and level - median > self.min_rise * abs(median)):
            return 0.0
        known = self._accepted[signal]
        if median > 0:
            known.move(factor=level / median)
            return level / median
        known.move(shift=level - median)
        return 1.0

    def _set_limits(self) -> None:
        self.medians = [known.median for known in self._accepted]
        self.alone = [self._limit(known) for known in self._accepted]
        self.harmful = [median + _HARMFUL * abs(median) for median in self.medians]
        self.familiar = [_FAMILIAR * known.peak for known in self._accepted]
        enough = len(self._accepted) > 1 and all(len(known) >= _TOGETHER_FROM for known in self._accepted)
        highest = [known.highest for known in self._accepted] if enough else []
        usable = enough and min(highest) > 0
        self.together = [self._factor * h for h in highest] if usable else [math.inf] * len(self._accepted)

    def _limit(self, known: _Accepted) -> float:
        if len(known) < self.warmup:
            return math.inf
        far = known.above(self.threshold)
        return max(far, known.median + self.min_rise * abs(known.median), known.usual_highest, _NOTHING * known.start)

    def state_dict(self) -> dict[str, Any]:
        """Return windows and flags, as plain numbers."""
        return {
            "accepted": [list(known.values) for known in self._accepted],
            "flagged": [list(row) for row in self._flagged],
            "flags": self._flags,
            "quiet": self._quiet,
            "peaks": [known.peak for known in self._accepted],
            "starts": [known.start for known in self._accepted],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`: the end of a longer window, nothing for other signals."""
        if len(state["accepted"]) != len(self._accepted):
            return
        for known, values in zip(self._accepted, state["accepted"], strict=True):
            known.fill(values)
        self._flagged.clear()
        self._flagged.extend(list(row) for row in state["flagged"])
        self._flags, self._quiet = state["flags"], state["quiet"]
        for known, peak in zip(self._accepted, state.get("peaks", ()), strict=False):  # not in the first checkpoints
            known.peak = peak
        for known, start in zip(self._accepted, state.get("starts", ()), strict=False):
            known.start = start
        self._set_limits()


@typed
@dataclass(frozen=True)
class Spikes:
    """Definition of a spike, and whether such a step is skipped; see `SpikeWindow`.

    Args:
        threshold: Number of robust standard deviations above the median of the last accepted values, above 0.
        min_rise: Smallest rise above the median in addition, as a share of it, at least 0.
        window: Number of accepted values that are kept.
        warmup: Number of accepted steps before the first flag, from 2 to ``window``.
        patience: Number of consecutive flags after which the new level is adopted.
        together: Loss and gradient norm are spikes if both are above this multiple of their highest in the window.
        skip: Whether to skip the step; otherwise it is reported only.

    Raises:
        ValueError: An argument is out of range.
    """

    threshold: float = 8.0
    min_rise: float = 0.1
    window: int = 128
    warmup: int = 64
    patience: int = 16
    together: float = 2.0
    skip: bool = True

    def __post_init__(self) -> None:
        self.window_of(1)

    def window_of(self, signals: int) -> SpikeWindow:
        """Create the `SpikeWindow` of ``signals`` signals."""
        return SpikeWindow(
            signals, self.threshold, self.min_rise, self.window, self.warmup, self.patience, self.together
        )


class _Accepted:
    """Last accepted values of one signal, in order of arrival and in order of size, with their logarithms."""

    def __init__(self, window: int) -> None:
        self.values: deque[float] = deque(maxlen=window)
        self.peak = 0.0
        self.start = 0.0
        self._sorted: list[float] = []
        self._logs: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        if len(self.values) == self.values.maxlen:
            oldest = bisect_left(self._sorted, self.values[0])
            del self._sorted[oldest], self._logs[oldest]
        self.values.append(value)
        self.peak = max(self.peak, abs(value))
        place = bisect_right(self._sorted, value)
        self._sorted.insert(place, value)
        self._logs.insert(place, _log(value))

    def fill(self, values: Sequence[float]) -> None:
        self.values.clear()
        self.values.extend(values)
        self.peak = max(self.peak, *map(abs, self.values), 0.0)
        self._sorted = sorted(self.values)
        self._logs = list(map(_log, self._sorted))

    def move(self, factor: float = 1.0, shift: float = 0.0) -> None:
        self.fill([value * factor + shift for value in self.values])

    @property
    def median(self) -> float:
        return _lower_median(self._sorted)

    @property
    def highest(self) -> float:
        return self._sorted[-1]

    @property
    def usual_highest(self) -> float:
        """The third highest value, which up to two outliers do not move."""
        return self._sorted[-3:][0]

    def above(self, sigmas: float) -> float:
        """Return the value ``sigmas`` robust σ above the median, on a log scale if all are positive."""
        logs = self._sorted[0] > 0
        scaled = self._logs if logs else self._sorted
        level = _lower_median(scaled)
        limit = level + sigmas * _TO_SIGMA * _lower_median_distance(scaled, level)
        if not logs:
            return limit
        return math.exp(limit) if limit < 700 else math.inf  # exp overflows above 709.


def _lower_median(ordered: Sequence[float]) -> float:
    """Return the lower of the two middle values; infinite for an empty sequence."""
    return ordered[(len(ordered) - 1) // 2] if ordered else math.inf


def _lower_median_distance(ordered: Sequence[float], level: float) -> float:
    """Return the lower median of the distances of ``ordered`` from ``level``, by a search instead of sorting them.

    Half of the values, those that are closest, follow each other. The larger of the distances at the two ends of such a
    row is least where both are nearly equal.
    """
    half = (len(ordered) - 1) // 2
    first, last = 0, len(ordered) - half  # of the rows that may be the closest, by their beginnings
    while first < last:
        middle = (first + last) // 2
        if ordered[middle + half] - level >= level - ordered[middle]:
            last = middle
        else:
            first = middle + 1
    ends = [ordered[first + half] - level] if first + half < len(ordered) else []
    return min([*ends, level - ordered[first - 1]] if first else ends)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
