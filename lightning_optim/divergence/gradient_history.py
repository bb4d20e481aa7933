"""Memory of the gradients of single parameters, on the host: what confirms a finding that one step alone suggests."""

from __future__ import annotations

import itertools
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
_PENDING = 2**14
"""Number of square sums from which the steps that have been added are processed; until then they are only kept."""
_COLUMNS = ("used", "seen", "gap", "first", "recent", "largest")


class GradientHistory:
    """What the steps so far show about the gradient of each parameter of one optimizer.

    All arrays have one element per parameter, by its place in the optimizer, and grow when a higher place appears. They
    are asked for at logging steps, so steps are kept until then, or until there are many, and processed at once.

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
        self._columns: dict[str, np.ndarray]
        self._pending: list[tuple[int, np.ndarray, np.ndarray | None]] = []
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
        at = None if places is None else places.astype(int)
        self.step = step
        self._pending.append((step, norm_sq, at))
        if len(self._pending) * len(norm_sq) >= _PENDING:
            self._take_in()
        if math.isfinite(loss):
            if len(self._losses) < _FIRST_LOSSES:
                self._losses.append(abs(loss))
                self._loss = abs(loss)
            self._loss += (1 - _LOSS_DECAY) * (abs(loss) - self._loss)

    def _take_in(self) -> None:
        """Process the steps that have been added: those with the same parameters at once."""
        pending, self._pending = self._pending, []
        for _, group in itertools.groupby(pending, key=_tensors):
            steps, norms, places = zip(*group, strict=True)
            self._add(steps, np.stack(norms), places[0])

    def _add(self, steps: Sequence[int], norm_sq: np.ndarray, places: np.ndarray | None) -> None:
        """Add consecutive steps.

        Args:
            steps: Their numbers.
            norm_sq: Square sum of each gradient, shape [steps, tensors].
            places: Place of each tensor in the optimizer, as for `update`.
        """
        at: Any = slice(0, norm_sq.shape[1]) if places is None else places
        self.reserve(norm_sq.shape[1] if places is None else int(at.max(initial=-1)) + 1)
        norm_sq = np.where(np.isfinite(norm_sq), norm_sq, 0.0)
        known, moves = self._columns, norm_sq > 0
        before = known["seen"][at]
        seen = np.maximum.accumulate(
            np.vstack([before, np.where(moves, np.array(steps, dtype=np.float64)[:, None], 0.0)]), axis=0
        )
        gaps = np.where(moves & (seen[:-1] > 0), seen[1:] - seen[:-1], 0.0)
        first = np.where(moves.any(axis=0), norm_sq[moves.argmax(axis=0), np.arange(norm_sq.shape[1])], 0.0)
        recent = known["recent"]
        for row in norm_sq:
            recent *= _DECAY
            recent[at] = np.maximum(recent[at], row)
        known["used"][at] = steps[-1]
        known["gap"][at] = np.maximum(known["gap"][at], gaps.max(axis=0))
        known["first"][at] = np.where(before == 0, first, known["first"][at])
        known["seen"][at] = seen[-1]
        known["largest"][at] = np.maximum(known["largest"][at], norm_sq.max(axis=0))

    def reserve(self, count: int) -> None:
        """Make room for so many parameters."""
        if (more := count - len(self._columns["used"])) > 0:
            self._columns = {name: np.concatenate([old, np.zeros(more)]) for name, old in self._columns.items()}

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in _COLUMNS:
            raise AttributeError(name)
        self._take_in()
        return self._columns[name]

    @property
    def has_converged(self) -> bool:
        """Whether the loss is next to nothing against the first ones, so that small gradients are as they should be."""
        return bool(self._losses) and self._loss <= _CONVERGED * sum(self._losses) / len(self._losses)

    def never_used(self, place: int) -> bool:
        """Return whether no step so far has given the parameter a gradient, not even one of zeros."""
        used = self.used
        return place >= len(used) or not used[place]

    def without_gradient(self) -> np.ndarray:
        """Return whether each parameter has been without a gradient for longer than is usual for it, shape [places]."""
        lasts: np.ndarray = self.step - self.seen >= np.maximum(_GRADIENTLESS, 3 * self.gap)
        return lasts

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain numbers and lists."""
        columns = {name: getattr(self, name).tolist() for name in _COLUMNS}
        return {"step": self.step, "losses": list(self._losses), "loss": self._loss, **columns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.step, self._losses, self._loss = state["step"], list(state["losses"]), state["loss"]
        self._pending.clear()
        self._columns = {name: np.array(state[name], dtype=np.float64) for name in _COLUMNS}

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
                    self._columns[name][new] = values[old]

    def _allocate(self, count: int) -> None:
        self._columns = {name: np.zeros(count) for name in _COLUMNS}


def _tensors(row: tuple[int, np.ndarray, np.ndarray | None]) -> tuple[int, bytes | None]:
    """Return what is equal for steps in which the same parameters had a gradient."""
    _, norm_sq, at = row
    return len(norm_sq), None if at is None else at.tobytes()
