"""Histograms of how large elements are, as a logger takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_optim.core.magnitude_columns import COLUMNS, FIRST, KINDS
from lightning_optim.core.suggest import nearest

TAGS = {
    "grad": "optim_grad/histogram",
    "param": "optim_param_norm/histogram",
    "update": "optim_update_norm/histogram",
}
"""Tag of a group's histogram, by kind."""

EDGES = tuple(math.log10(2) * (FIRST + column - 2) for column in range(COLUMNS + 1))
"""Between which the columns lie, in log10 of the magnitude. Zeros are put left of all, what is not finite right."""


@dataclass(frozen=True)
class Histograms:
    """Histograms by `OptimizerMonitor` on TensorBoard, one for each parameter group.

    They are of log10 of the magnitudes, in steps of a power of two, counted on the device. Exact zeros have a column of
    their own at the left end (-12.6 to -12.3), what is below 2**-40 the one next to it; what is not finite has the one
    at the right end (5.1 to 5.4), what is above 65536 the one before. fp16 ends at -7.2, and loses digits below -4.2.

    Args:
        of: ``"grad"`` before clipping and without loss scale, ``"param"`` after the step, and ``"update"``, the change,
            for which the parameters are copied for the length of the step.
        every: Number of reports from one histogram to the next.

    Raises:
        ValueError: A kind is unknown, or ``every`` not positive; the message names the nearest.

    Example:
        >>> Histograms(of=["grad"], every=5)
        Histograms(of=['grad'], every=5)
    """

    of: Sequence[str] = KINDS
    every: int = 20

    def __post_init__(self) -> None:
        if isinstance(self.of, str):
            raise ValueError(f"Invalid of={self.of!r} of Histograms: a list is needed, for instance [{self.of!r}].")
        for kind in self.of:
            if kind not in KINDS:
                raise ValueError(f"There are no histograms of {kind!r}. {nearest(kind, KINDS)}")
        if self.every < 1:
            raise ValueError(f"Invalid every={self.every!r}: a whole number of at least 1 is needed, for instance 20.")


def buckets(counts: np.ndarray) -> tuple[list[float], list[float]] | None:
    """Return edges and counts of the columns from the first to the last that is not empty; None if all are.

    Args:
        counts: Counts of one group, shape [columns]; NaN if there was nothing to count.
    """
    if np.isnan(counts).any() or not counts.any():
        return None
    full = np.flatnonzero(counts)
    first, end = int(full[0]), int(full[-1]) + 1
    return list(EDGES[first : end + 1]), counts[first:end].tolist()
