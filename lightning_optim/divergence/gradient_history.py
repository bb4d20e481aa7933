"""Memory of the gradients of single parameters, on the host: what confirms a finding that one step alone suggests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_DECAY = 0.5
"""Factor per step on the recent maximum of a square sum: after 20 steps a past gradient counts for a millionth."""
_FIRST_LOSSES = 5
_LOSS_DECAY = 0.5
_CONVERGED = 1e-3
"""Share of the first losses below which there is next to nothing left to learn, and gradients are small by right."""
_GRADIENTLESS = 20
"""Smallest number of steps without a gradient that means more than a parameter that is used now and then."""
_COLUMNS = ("used", "seen", "gap", "first", "recent", "largest")


class GradientHistory:
    """What the steps so far show about the gradient of each parameter of one optimizer.

    All arrays have one element per parameter, by its place in the optimizer, and grow when a higher place appears.

    Attributes:
        step: Number of the last step.
        used: Last step in which the parameter had a gradient, 0 or not; 0 if it never had one. Shape [places].
        seen: Last step in which its gradient was not 0; 0 for none. Shape [places].
        gap: Largest number of steps from one such step to the next. Shape [places].
        first: Square sum of its first gradient other than 0. Shape [places].
        recent: Largest square sum of the last steps, decaying. Shape [places].
        largest: Largest square sum of all steps. Shape [places].

    Example:
        >>> history = GradientHistory()
        >>> for step in range(1, 41):
        ...     history.update(step, np.array([1.0, 0.0, step % 4.0]), None, loss=1.0)
        >>> history.without_gradient().tolist()
        [False, True, False]
    """

    def __init__(self) -> None:
        self.step = 0
        self._allocate(0)
        self._losses: list[float] = []
        self._loss = math.nan

    def update(self, step: int, norm_sq: np.ndarray, places: np.ndarray | None, loss: float) -> None:
        """Add a step.

        Args:
            step: Number of optimizer steps so far, this one included.
            norm_sq: Square sum of each gradient, shape [tensors]; those that are not finite are left out.
            places: Place of each tensor in the optimizer, shape [tensors]; None if all parameters have a gradient.
            loss: The loss; NaN if it is not known.
        """
        at: Any = slice(0, len(norm_sq)) if places is None else places.astype(int)
        count = len(norm_sq) if places is None else int(at.max(initial=-1)) + 1
        self.reserve(count)
        self.step = step
        # Written for a few microseconds per step: no indexing by masks.
        norm_sq = np.where(np.isfinite(norm_sq), norm_sq, 0.0)
        moves = norm_sq > 0
        self.used[at] = step
        seen = self.seen[at]
        self.gap[at] = np.maximum(self.gap[at], np.where(moves & (seen > 0), step - seen, 0))
        self.first[at] = np.where(seen == 0, norm_sq, self.first[at])
        self.seen[at] = np.where(moves, step, seen)
        self.recent *= _DECAY
        self.recent[at] = np.maximum(self.recent[at], norm_sq)
        self.largest[at] = np.maximum(self.largest[at], norm_sq)
        if math.isfinite(loss):
            if len(self._losses) < _FIRST_LOSSES:
                self._losses.append(abs(loss))
                self._loss = abs(loss)
            self._loss += (1 - _LOSS_DECAY) * (abs(loss) - self._loss)

    def reserve(self, count: int) -> None:
        """Make room for so many parameters."""
        if (more := count - len(self.used)) > 0:
            for name in _COLUMNS:
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(more)]))

    @property
    def has_converged(self) -> bool:
        """Whether the loss is next to nothing against the first ones, so that small gradients are as they should be."""
        return bool(self._losses) and self._loss <= _CONVERGED * sum(self._losses) / len(self._losses)

    def never_used(self, place: int) -> bool:
        """Return whether no step so far has given the parameter a gradient, not even one of zeros."""
        return place >= len(self.used) or not self.used[place]

    def without_gradient(self) -> np.ndarray:
        """Return whether each parameter has been without a gradient for longer than is usual for it, shape [places]."""
        return self.step - self.seen >= np.maximum(_GRADIENTLESS, 3 * self.gap)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain numbers and lists."""
        columns = {name: getattr(self, name).tolist() for name in _COLUMNS}
        return {"step": self.step, "losses": list(self._losses), "loss": self._loss, **columns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.step, self._losses, self._loss = state["step"], list(state["losses"]), state["loss"]
        for name in _COLUMNS:
            setattr(self, name, np.array(state[name], dtype=np.float64))

    def move(self, places: Sequence[int]) -> None:
        """Follow parameters to other places in the optimizer.

        Args:
            places: The new place of the parameter at each old place; -1 for one that is gone.
        """
        before = {name: getattr(self, name) for name in _COLUMNS}
        self._allocate(max(places, default=-1) + 1)
        for old, new in enumerate(places):
            if new >= 0 and old < len(before["used"]):
                for name, values in before.items():
                    getattr(self, name)[new] = values[old]

    def _allocate(self, count: int) -> None:
        self.used, self.seen, self.gap, self.first, self.recent, self.largest = np.zeros((len(_COLUMNS), count))
