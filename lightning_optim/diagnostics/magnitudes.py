"""Histograms of the magnitudes of elements, in the form that loggers take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_optim.core.magnitude_columns import COLUMNS, FIRST, KINDS
from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import typed

TAGS = {
    "grad": "optim_grad/histogram",
    "param": "optim_param_norm/histogram",
    "update": "optim_update_norm/histogram",
}
"""Tag of a group's histogram, by kind."""

EDGES = tuple(math.log10(2) * (FIRST + column - 2) for column in range(COLUMNS + 1))
"""Edges of the columns, in log10 of the magnitude; zeros are at the left end, NaN and infinities at the right."""


@typed
@dataclass(frozen=True)
class Histograms:
    """Histograms of magnitudes that `OptimizerMonitor` writes to TensorBoard, one for each parameter group.

    They show log10 of the magnitudes, in steps of a power of two, counted on the device. Exact zeros have their own
    column at the left end (-12.6 to -12.3), next to that of values below 2**-40; values that are not finite have the
    column at the right end (5.1 to 5.4), next to that of values above 65536. fp16 ends at -7.2, and loses digits below
    -4.2.

    Args:
        of: ``"grad"`` before clipping and without loss scale, ``"param"`` after the step, and ``"update"``, the change,
            for which the parameters are copied for the duration of the step.
        every: Number of reports from one histogram to the next, at least 1.

    Raises:
        ValueError: A kind is unknown, or ``every`` is below 1; the message names the nearest kind.

    Example:
        >>> Histograms(of=["grad"], every=5)
        Histograms(of=['grad'], every=5)
    """

    of: Sequence[str] = KINDS
    every: int = 20

    def __post_init__(self) -> None:
        if isinstance(self.of, str):
            raise ValueError(f"Invalid of={self.of!r} of Histograms: must be a list, for instance [{self.of!r}].")
        for kind in self.of:
            if kind not in KINDS:
                raise ValueError(f"Invalid of=[{kind!r}] of Histograms: unknown kind. {nearest(kind, KINDS)}")
        if self.every < 1:
            raise ValueError(f"Invalid every={self.every!r}: must be a whole number of at least 1, for instance 20.")


def buckets(counts: np.ndarray) -> tuple[list[float], list[float]] | None:
    """Return edges and counts of the columns from the first to the last that is not empty.

    Args:
        counts: Counts of one group, shape [columns]; NaN if there was nothing to count.

    Returns:
        The edges, one more than there are columns, and the counts; None if all columns are empty.
    """
    if np.isnan(counts).any() or not counts.any():
        return None
    full = np.flatnonzero(counts)
    first, end = int(full[0]), int(full[-1]) + 1
    return list(EDGES[first : end + 1]), counts[first:end].tolist()
