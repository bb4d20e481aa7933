"""Detection of a loss that leaves its best too slowly, or too noisily, for any single step to stand out."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from lightning_optim.core.stateful import Stateful
from lightning_optim.core.typed import typed

SUSTAINED = 2.0
"""Factor of a lasting rise that no change of the data or of what is trained explains: the weights are worse."""

_WINDOW = 128
_START = 20
_CLEAR = 8.0
"""Number of robust standard deviations from step to step, of the logarithm, by which a clear rise is above the best."""
_FEW = 4
_LOST = 0.5
"""Share of what was learned, the first losses less the best, that a clear rise takes away."""
_GROWN = 1.1
"""Factor of the gradient norm over that at the lowest loss: a loss that rises for other reasons need not raise it."""
_AT_ONCE = 0.5
"""Share of a rise between two steps that is no work of a learning rate in its warm-up, which takes several."""
_LEARNED = 0.05
_TO_SIGMA = 1.4826
"""Standard deviation over median absolute deviation, for a normal distribution."""
_MOST = 7.0
"""Largest amount that one step adds to the evidence, so that an alarm takes several steps."""


@typed
class SlowDivergence(Stateful):
    """Alarm on enough evidence that the loss has left its best, by Page's cumulative sum.

    The best is the lowest value that an average of the loss has had. The unit of a rise is ``rise`` times the best, or
    the noise if that is larger: the root mean square of the loss's change from step to step, over √2. The unit is also
    at least a twentieth of what has been learned, the median of the first 20 losses less the best, because the loss of
    a model that has memorised its data varies by any factor near 0. Each step adds the number of units by which its
    loss is above the best, less one; the sum never falls below 0, and no step adds more than 7. When the sum reaches
    ``patience`` there is an alarm: after 50 steps two units above the best, after 8 steps far above it. On noise alone
    the sum falls by a third of a unit per step or more, so that it does not get there (Page, 1954, "Continuous
    inspection schemes"; measured by ``tests/divergence/test_detectors.py``).

    After an alarm the present level is the new best, so that one divergence gives one alarm, and another only if it
    continues. A level of twice the best is not adopted; while it lasts there are further alarms, each at twice the
    evidence.

    Whether a loss should fall at all is another question: `has_fallen` and `rise_was_clear` say whether it has, and
    whether a rise is more than what annealed terms, a growing queue of negatives, or an agent's growing returns cause.

    Args:
        rise: Smallest rise that counts, as a share of the best, above 0.
        patience: Evidence that gives an alarm, in steps of two units above the best, at least 1.
        decay: Decay of the average, in [0, 1); 0.95 averages over about the last 20 steps.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> trend = SlowDivergence()
        >>> losses = [1.0] * 100 + [1.003**k for k in range(150)]
        >>> [step for step, loss in enumerate(losses) if trend.update(loss)]
        [211]
    """

    ADDED = ("has_fallen", "grad_norm", "grad_norm_at_lowest", "lowest", "unclipped")
    STATE = ("first", "seen", "average", "best", "doubt", "evidence", "unit", "insisted", "recent", "last", *ADDED)

    def __init__(self, rise: float = 0.15, patience: int = 50, decay: float = 0.95) -> None:
        if not (math.isfinite(rise) and rise > 0):
            raise ValueError(f"Invalid rise={rise!r}: must be a share of the best loss above 0, for instance 0.15.")
        if patience < 1:
            raise ValueError(f"Invalid patience={patience!r}: must be at least 1, for instance 50.")
        if not 0 <= decay < 1:
            raise ValueError(f"Invalid decay={decay!r}: must be in [0, 1), for instance 0.95.")
        self.rise, self.patience, self.decay = rise, patience, decay
        self._first: list[float] = []
        self.rise_was_clear = self.rise_was_sudden = False
        """Whether the rise of the last alarm was clear: gradual, of half of what was learned, beyond noise."""
        self.has_fallen = False
        """Whether the best is clearly below the first losses: by a twentieth, and by more than the noise.

        A best among the first losses does not count, since then the loss has only risen.
        """
        self.rebase()

    def rebase(self) -> None:
        """Forget the present level and the lowest one, because those of other data are not comparable."""
        self._lowest, self._grad_norm, self._grad_norm_at_lowest = math.inf, math.nan, math.nan
        self._unclipped: deque[float] = deque(maxlen=_WINDOW)
        self._begin()

    def _begin(self) -> None:
        """Forget the present level after an alarm, because the next level is unknown."""
        self._seen, self._average, self._best, self._doubt = 0, 0.0, math.inf, 1.0
        self._evidence = self._unit = 0.0
        self._insisted = 0
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._squares: deque[float] = deque(maxlen=_WINDOW - 1)
        self._last: deque[float] = deque(maxlen=int(_MOST) + 1)

    def update(self, loss: float, grad_norm: float = math.nan) -> bool:
        """Add the loss of a step that was taken.

        Args:
            loss: The loss, a number on the host; one that is not finite is ignored.
            grad_norm: The gradient norm of that step; NaN if it is not known.

        Returns:
            Whether to raise an alarm.
        """
        if not math.isfinite(loss):
            return False
        if len(self._first) < _START:
            self._first.append(loss)
        self._last.append(loss)
        self._unclipped.append(loss)
        loss = min(loss, self._best + (_MOST + 1) * self._unit)  # One huge loss must not count as noise.
        if self._recent:
            self._squares.append((loss - self._recent[-1]) ** 2)
        self._recent.append(loss)
        self._seen += 1
        # A plain mean at first, so that the first loss does not linger.
        weight = max(1 - self.decay, 1 / self._seen)
        self._average += weight * (loss - self._average)
        self._add_grad_norm(grad_norm)
        noise = self._noise()
        doubt = 1 + 2 * math.sqrt(weight - (1 - self.decay))  # The mean of a few losses may be low by chance.
        now, before = self._unit_of(self._average, doubt * noise), self._unit_of(self._best, self._doubt * noise)
        if self._average + now < self._best + before:
            self._best, self._doubt, before = self._average, doubt, now
            if self._best < self._lowest:
                self._lowest, self._grad_norm_at_lowest = self._best, self._grad_norm
            self.has_fallen = self.has_fallen or self._is_below_start(noise)
        self._unit = before
        if self._unit > 0:
            self._evidence = max(0.0, self._evidence + min(_MOST, (loss - self._best) / self._unit - 1))
        if self._evidence < self.patience * 2**self._insisted:
            return False
        self._evidence = 0.0
        self._insisted += 1
        self.rise_was_clear, self.rise_was_sudden = self._kind_of_rise()
        if not self.lost:
            self._begin()
        return True

    @property
    def rose_at_once(self) -> bool:
        """Whether most of the rise above the best took place between two steps of the last 128, and has lasted."""
        logs = self._logs()
        if len(logs) < 2 * _FEW:
            return False
        rise = statistics.median(logs[-2 * _FEW :]) - math.log(self._lowest)
        steps = (min(logs[k : k + 2]) - max(logs[k - _FEW : k]) for k in range(_FEW, len(logs) - 1))
        return rise > 0 and max(steps) >= _AT_ONCE * rise

    def far(self, loss: float) -> bool:
        """Return whether a loss is too far above the best to be noise: twice as high, and four units above it."""
        return self._best > 0 and self._unit > 0 and loss >= max(SUSTAINED * self._best, self._best + 4 * self._unit)

    @property
    def best(self) -> float:
        """The best average so far; infinite before the first."""
        return self._best

    @property
    def lost(self) -> bool:
        """Whether the last losses are twice the best: the weights are worse, which a lower rate does not fix."""
        return bool(self._last) and self._best > 0 and statistics.median(self._last) >= SUSTAINED * self._best

    @property
    def learned(self) -> bool:
        """Whether the loss is clearly below the first ones, unlike that of a network that has collapsed."""
        return bool(self._first) and self._average < 0.95 * self._first[0]

    def _unit_of(self, best: float, noise: float) -> float:
        return max(self.rise * abs(best), noise, _LEARNED * (statistics.median(self._first) - best))

    def _is_below_start(self, noise: float) -> bool:
        start = statistics.median(self._first)
        return self._seen >= 2 * _START and start - self._best >= max(_LEARNED * abs(start), noise)

    def _kind_of_rise(self) -> tuple[bool, bool]:
        """Return whether the rise is clear, and whether it is sudden.

        Where weights leave a good region half of what was learned is lost, gradually, and far beyond the noise, with
        larger gradients. A rise within a few steps is one of the data or of the loss function, and a term that is
        annealed or a harder task costs less than half. Logarithms are taken, because the noise of a loss grows with it.
        """
        logs = self._logs()
        if len(logs) < 2:
            return False, False
        noise = _TO_SIGMA * statistics.median(abs(b - a) for a, b in itertools.pairwise(logs)) / math.sqrt(2)
        now, start = statistics.median(self._last), statistics.median(self._first)
        rise, is_lost = math.log(now / self._lowest), now - self._lowest >= _LOST * (start - self._lowest)
        has_grown = not self._grad_norm <= _GROWN * self._grad_norm_at_lowest  # also if it is not known
        is_sudden = _largest_step(logs) >= rise / 2
        return is_lost and has_grown and rise >= _CLEAR * noise and not is_sudden, is_sudden

    def _logs(self) -> list[float]:
        """Return the logarithms of the last losses; empty if one of them or the lowest has none, or none is known."""
        if not 0 < self._lowest < math.inf or min(self._unclipped, default=0.0) <= 0:
            return []
        return [math.log(loss) for loss in self._unclipped]

    def _add_grad_norm(self, norm: float) -> None:
        if math.isfinite(norm):
            before = self._grad_norm
            self._grad_norm = norm if math.isnan(before) else before + (1 - self.decay) * (norm - before)

    def _noise(self) -> float:
        """Return the standard deviation from step to step, computed from differences, which a drift hardly changes."""
        return math.sqrt(sum(self._squares) / (2 * max(len(self._recent) - 1, 1)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        super().load_state_dict(state)
        self._squares.clear()
        self._squares.extend((b - a) ** 2 for a, b in itertools.pairwise(self._recent))


def _largest_step(logs: list[float]) -> float:
    """Return the largest rise from the mean of a few values to that of as many after them."""
    means = [statistics.fmean(logs[k : k + _FEW]) for k in range(len(logs) - _FEW + 1)]
    return max((after - before for before, after in zip(means, means[_FEW:], strict=False)), default=math.inf)
