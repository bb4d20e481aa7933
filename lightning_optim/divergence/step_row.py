"""The row of a step in the log: which numbers it has in which order, and how the host reads them.

The order is: whether the step was skipped; the values of the signals; a flag for each signal and each further detector;
the square sum of each gradient; the place of each in the optimizer, if some parameters have no gradient; and the two
squared ratios of each to its second moment, if they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_optim.divergence.observation import SIGNALS

_NAMED = 4
"""Largest number of parameters that are named of one step."""


@dataclass(frozen=True)
class RowLayout:
    """Layout of a row, which the host needs to read it.

    Args:
        group_sizes: Number of gradients in each group.
        has_loss: Whether the loss is known.
        has_places: Whether the row has the place of each gradient.
        num_detectors: Number of further detectors.
        moved: Where the parameter at each place is now, if the run was resumed with another order; -1 for one that is
            gone.
        has_ratios: Whether the row has the ratios to the second moments.
    """

    group_sizes: tuple[int, ...]
    has_loss: bool
    has_places: bool
    num_detectors: int = 0
    moved: tuple[int, ...] = ()
    has_ratios: bool = False

    def read(self, numbers: np.ndarray) -> StepRow:
        """Return the parts of a row.

        Args:
            numbers: The row, shape [columns].
        """
        count = len(SIGNALS)
        values, rest = numbers[1 : 1 + count].tolist(), numbers[1 + count :]
        flags = tuple(bool(flag) and math.isfinite(value) for flag, value in zip(rest[:count], values, strict=True))
        others, rest = rest[count : count + self.num_detectors], rest[count + self.num_detectors :]
        norm_sq = rest[: sum(self.group_sizes)]
        places = rest[len(norm_sq) : 2 * len(norm_sq)].astype(int) if self.has_places else None
        ratios_sq = rest[-2 * len(norm_sq) :].reshape(2, -1) if self.has_ratios else None
        detected = tuple(map(bool, others))
        return StepRow(self, bool(numbers[0]), values, flags, detected, norm_sq, places, ratios_sq)

    def as_list(self) -> list[Any]:
        """Return the layout as plain values, for a checkpoint."""
        places = self.has_places, self.num_detectors, list(self.moved)
        return [list(self.group_sizes), self.has_loss, *places, self.has_ratios]

    @classmethod
    def from_list(cls, saved: Sequence[Any]) -> RowLayout:
        """Return the layout that `as_list` returned; version 0.1 saved less."""
        sizes, has_loss, has_places, *rest = saved
        return cls(tuple(sizes), has_loss, has_places, *rest)


@dataclass(frozen=True)
class StepRow:
    """The parts of a row, on the host.

    Args:
        layout: Its layout.
        skipped: Whether the step did not happen.
        values: Value of each signal; NaN for a loss that is unknown.
        flags: Whether each signal is a spike; a value that is not finite is none.
        detected: Whether each further detector requested a skip.
        norm_sq: Square sum of each gradient, shape [tensors].
        places: Place of each in the optimizer, when the step took place, shape [tensors]; None if they are consecutive.
        ratios_sq: Square of each gradient's two ratios to its second moment, shape [2, tensors]; None without them.
    """

    layout: RowLayout
    skipped: bool
    values: list[float]
    flags: tuple[bool, ...]
    detected: tuple[bool, ...]
    norm_sq: np.ndarray
    places: np.ndarray | None
    ratios_sq: np.ndarray | None

    @property
    def bad_tensors(self) -> int:
        """Number of gradients with a NaN or an infinity."""
        return int((~np.isfinite(self.norm_sq)).sum())

    @property
    def bad_loss(self) -> bool:
        """Whether the loss is known and not finite."""
        return self.layout.has_loss and not math.isfinite(self.values[SIGNALS.index("loss")])

    def places_now(self) -> np.ndarray | None:
        """Return where the parameter of each gradient is now; -1 for one that is gone, None if all are consecutive."""
        if not self.layout.moved:
            return self.places
        return np.array(self.layout.moved)[np.arange(len(self.norm_sq)) if self.places is None else self.places]

    def parameters(self, tensors: Sequence[int]) -> tuple[int, ...]:
        """Return where the parameters of some gradients are now, without those that are gone.

        Args:
            tensors: Indices of the gradients.
        """
        now = self.places_now()
        return tuple(tensors) if now is None else tuple(int(now[i]) for i in tensors if now[i] >= 0)

    def worst(self) -> tuple[int, ...]:
        """Return where the parameters with the worst gradients are: those that are not finite, then the largest."""
        key = np.where(np.isfinite(self.norm_sq), self.norm_sq, np.inf)
        return self.parameters(np.argsort(-key, kind="stable")[:_NAMED].tolist())

    def group_norms(self) -> tuple[float, ...]:
        """Return the gradient norm of each group."""
        sizes = self.layout.group_sizes
        ends = np.cumsum(sizes)
        return tuple(float(np.sqrt(self.norm_sq[e - n : e].sum())) for e, n in zip(ends, sizes, strict=True))
