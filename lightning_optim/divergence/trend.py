"""A loss that creeps away from its best, too slowly for any single step to stand out."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

_WINDOW = 128
_WARMUP = 20
"""Steps before there is a best: the length of the fast average."""


class SlowDivergence:
    """Alarms if an average of the loss stays clearly above its best.

    Clearly is more than ``rise`` of the best and more than one standard deviation of the loss from step to step, for
    ``patience`` steps in a row: such an average wanders by a sixth of that, so that noise alone does not do it. After
    an alarm the present level is the new best: one alarm for one divergence, the next if it goes on.

    Args:
        rise: By what share of the best.
        patience: For how many steps in a row.
        decay: Of the average: 0.95 averages over the last 20 steps or so.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> trend = SlowDivergence()
        >>> losses = [1.0] * 100 + [1.003**k for k in range(150)]
        >>> [step for step, loss in enumerate(losses) if trend.update(loss)]
        [214]
    """

    def __init__(self, rise: float = 0.15, patience: int = 50, decay: float = 0.95) -> None:
        if not (math.isfinite(rise) and rise > 0):
            raise ValueError(f"Invalid rise={rise!r}: a share of the best loss above 0 is needed, for instance 0.15.")
        if patience < 1:
            raise ValueError(f"Invalid patience={patience!r}: at least one step is needed, for instance 50.")
        if not 0 <= decay < 1:
            raise ValueError(f"Invalid decay={decay!r}: it lies in [0, 1), for instance 0.95.")
        self.rise, self.patience, self.decay = rise, patience, decay
        self._seen = 0
        self._fast = 0.0
        self._best = math.inf
        self._above = 0
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    def update(self, loss: float) -> bool:
        """Takes in the loss of a step that was taken; whether to alarm."""
        if not math.isfinite(loss):
            return False
        self._seen += 1
        # A plain mean at first, so that the first loss does not linger.
        weight = max(1 - self.decay, 1 / self._seen)
        self._fast += weight * (loss - self._fast)
        self._recent.append(loss)
        if self._seen < _WARMUP:
            return False
        if self._fast < self._best:
            self._best, self._above = self._fast, 0
            return False
        higher = self._fast - self._best
        clearly = higher > self.rise * abs(self._best) and higher > self._noise()
        self._above = self._above + 1 if clearly else 0
        if self._above < self.patience:
            return False
        self.rebase()
        return True

    def rebase(self) -> None:
        """The next level is a new one, of which nothing is known yet: after an alarm, or a jump that was adopted."""
        self._seen, self._fast, self._best, self._above = 0, 0.0, math.inf, 0
        self._recent.clear()

    def _noise(self) -> float:
        """Standard deviation from step to step; from differences, which a drift does not enter."""
        values = list(self._recent)
        steps = [abs(b - a) for a, b in itertools.pairwise(values)]
        return 1.4826 * statistics.median(steps) / math.sqrt(2)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "seen": self._seen,
            "fast": self._fast,
            "best": self._best,
            "above": self._above,
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self._seen, self._fast = state["seen"], state["fast"]
        self._best, self._above = state["best"], state["above"]
        self._recent = deque(state["recent"], maxlen=_WINDOW)
