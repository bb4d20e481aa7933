"""Curves of a variant over its seeds: their mean and spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

from lightning_optim.diagnostics.run_report.analysis import reached
from lightning_optim.tuning.compare.metric import Metric
from lightning_optim.tuning.compare.outcome import Comparison
from lightning_optim.tuning.runs import JobResult
from lightning_optim.tuning.runs.records import Points

_BINS = 60
_SHARES = (0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Spread:
    """A mean curve, and one standard deviation over seeds below and above it.

    Args:
        middle: Mean of the seeds.
        low: Lower edge; empty with one seed.
        high: Upper edge; empty with one seed.
    """

    middle: Points
    low: Points
    high: Points


def spread_of(curves: Sequence[Points]) -> Spread:
    """Return mean and spread of curves at the steps that any of them has.

    Args:
        curves: A curve for each seed; values that are not finite are left out.

    Example:
        >>> spread_of([[(1, 1.0, 0.5)], [(1, 3.0, 1.5)]]).middle
        [(1, 2.0, 1.0)]
    """
    at: dict[int, list[tuple[float, float]]] = {}
    for curve in curves:
        for step, value, seconds in curve:
            if math.isfinite(value):
                at.setdefault(step, []).append((value, seconds))
    middle, low, high = Points(), Points(), Points()
    for step, seen in sorted(at.items()):
        values = [value for value, _ in seen]
        center, place = mean(values), mean(seconds for _, seconds in seen)
        middle.append((step, center, place))
        if len(curves) > 1:
            width = stdev(values) if len(values) > 1 else 0.0
            low.append((step, center - width, place))
            high.append((step, center + width, place))
    return Spread(middle, low, high)


def binned(curve: Points, steps: int) -> Points:
    """Return a curve as means over equal spans of steps, so that those of several seeds have the same places.

    Args:
        curve: Losses of single steps.
        steps: Number of steps of the whole run.
    """
    size = max(-(-steps // _BINS), 1)
    spans: dict[int, list[tuple[float, float]]] = {}
    for step, value, seconds in curve:
        spans.setdefault(-(-step // size), []).append((value, seconds))
    return [(k * size, mean(v for v, _ in span), span[-1][1]) for k, span in sorted(spans.items())]


def validation_curves(results: Mapping[int, JobResult], metric: Metric) -> list[Points]:
    """Return the curve of a metric for each seed that has one."""
    found = [result.validation().get(metric.name, []) for result in results.values()]
    return [curve for curve in found if curve]


def training_curves(results: Mapping[int, JobResult]) -> list[Points]:
    """Return the smoothed training loss for each seed."""
    curves = [result.curve() for result in results.values()]
    steps = max((curve[-1][0] for curve in curves if curve), default=0)
    return [binned(curve, steps) for curve in curves if curve]


def levels(comparison: Comparison) -> list[list[str]]:
    """Return when each variant reached each level of the metric.

    The levels have a half, a quarter and a tenth of the way left from the median first value to the best mean, and the
    best mean of the first variant.

    Returns:
        Rows of variant and, for each level, the median step and seconds over its seeds; the header first.
    """
    metric, higher = comparison.metric, comparison.metric.higher
    of_each = {
        name: validation_curves(results, metric) if metric.of_validation else training_curves(results)
        for name, results in comparison.results.items()
    }
    finite = {name: [[p for p in c if math.isfinite(p[1])] for c in curves] for name, curves in of_each.items()}
    firsts = [curve[0][1] for curves in finite.values() for curve in curves if curve]
    ends = {
        name: mean((max if higher else min)(p[1] for p in curve) for curve in curves)
        for name, curves in finite.items()
        if curves and all(curves)
    }
    if not firsts or not ends:
        return []
    first, best = median(firsts), (max if higher else min)(ends.values())
    targets = [best + (first - best) * share for share in _SHARES]
    reference = next(iter(comparison.results))
    sign = "≥" if higher else "≤"
    header = ["variant", *(f"{sign} {target:.4g}" for target in targets)]
    if reference in ends:
        targets.append(ends[reference])
        header.append(f"{sign} {ends[reference]:.4g} (best of {reference})")
    return [header, *([name, *(_reached(finite[name], t, higher) for t in targets)] for name in comparison.results)]


def _reached(curves: Sequence[Points], target: float, higher: bool) -> str:
    """Return the median step and time at which the seeds reached a level; that of those that did, with their number."""
    found = [at for curve in curves if (at := reached(curve, target, higher)) is not None]
    if not found:
        return "never"
    text = f"{median(step for step, _ in found):,.0f} ({median(seconds for _, seconds in found):.1f} s)"
    return text if len(found) == len(curves) else f"{text}, {len(found)} of {len(curves)} seeds"
