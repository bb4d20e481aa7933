"""Whether one variant is better than another: paired differences over seeds, with their interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, stdev

LEVEL = 0.95
"""Confidence of all intervals of one comparison together."""


@dataclass(frozen=True)
class Difference:
    """How much worse a variant is than the best one.

    Args:
        seeds: Number of seeds that both have finished.
        mean: Mean difference of the metric, above 0 where the variant is worse.
        half_width: Half the width of the interval around it; NaN with fewer than two seeds.
    """

    seeds: int
    mean: float
    half_width: float

    @property
    def verdict(self) -> str:
        """``"worse"``, ``"within noise"``, or ``"cannot tell"`` with fewer than two seeds."""
        if self.seeds < 2:
            return "cannot tell"
        return "worse" if self.mean - self.half_width > 0 else "within noise"


def paired(
    best: Mapping[int, float], other: Mapping[int, float], higher: bool = False, comparisons: int = 1
) -> Difference:
    """Compare a variant with the best one, seed by seed: what a seed does to both of them cancels.

    Args:
        best: Metric of the best variant by seed.
        other: Metric of the other one by seed.
        higher: Whether larger values are better.
        comparisons: Number of variants that are compared with the best one. The interval of each is the wider, so that
            all of them hold together (Bonferroni).

    Returns:
        The difference with its interval (Student's t).

    Example:
        >>> paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.5, 1: 2.5, 2: 3.6}).verdict
        'worse'
        >>> paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.5, 1: 1.4, 2: 3.6}).verdict
        'within noise'
        >>> paired({0: 1.0}, {0: 1.5}).verdict
        'cannot tell'
    """
    sign = -1 if higher else 1
    gaps = [sign * (other[seed] - best[seed]) for seed in best if seed in other]
    if len(gaps) < 2:
        return Difference(len(gaps), gaps[0] if gaps else math.nan, math.nan)
    quantile = t_quantile(1 - (1 - LEVEL) / max(comparisons, 1), len(gaps) - 1)
    return Difference(len(gaps), mean(gaps), quantile * stdev(gaps) / math.sqrt(len(gaps)))


def t_quantile(level: float, freedom: int) -> float:
    """Return the half-width of the central interval of Student's t distribution that holds ``level`` of it.

    Args:
        level: Between 0 and 1.
        freedom: Degrees of freedom, at least 1.

    Example:
        >>> round(t_quantile(0.95, 2), 3), round(t_quantile(0.95, 9), 3)
        (4.303, 2.262)
    """
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """Return the probability that a value is within ±t: a finite sum for whole degrees of freedom."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
