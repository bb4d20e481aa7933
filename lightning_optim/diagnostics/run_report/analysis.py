"""Tables of a report: when levels were reached, how runs generalise, how stable they were."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from lightning_optim.diagnostics.metric_names import is_better_higher, quantity_of, split_of, training_name
from lightning_optim.diagnostics.run_report.run import Points, Run, loss_tags

_SHARES = (0.5, 0.25, 0.1)
"""Shares of the way from the median first value to the best, that are left at the levels of `convergence`."""

ACTS = {
    "steps skipped": "skipped_steps",
    "rollbacks": "rollbacks",
    "cuts of the rate": "lr_cuts",
    "spike score, loss": "spike_score_loss",
    "spike score, gradient norm": "spike_score_grad_norm",
}
"""Tag of each number about a run's health, without ``optim_health/``, by its name."""


def finite(points: Points) -> Points:
    """Return the points whose values are finite."""
    return [point for point in points if math.isfinite(point[1])]


def best_of(points: Points, higher: bool) -> tuple[int, float, float] | None:
    """Return the point with the best value, the first of several; None if no value is finite."""
    known = finite(points)
    return (max if higher else min)(known, key=lambda point: point[1]) if known else None


def reached(points: Points, target: float, higher: bool = False) -> tuple[int, float] | None:
    """Return step and seconds at which the values first reached ``target``; None if they never did.

    Args:
        points: The points.
        target: The level.
        higher: Whether larger values are better.

    Example:
        >>> reached([(0, 2.0, 0.0), (10, 0.9, 5.0), (20, 0.7, 10.0)], 1.0)
        (10, 5.0)
        >>> reached([(0, 0.5, 0.0), (10, 0.9, 5.0)], 0.8, higher=True)
        (10, 5.0)
    """
    return next(((s, t) for s, value, t in points if (value >= target if higher else value <= target)), None)


def convergence(runs: Iterable[Run], targets: Sequence[float] | None = None) -> list[list[str]]:
    """Return when each run first reached each loss.

    Args:
        runs: The runs.
        targets: Losses; None for those with a half, a quarter and a tenth of the way left from the median first loss
            to the best loss.

    Returns:
        Rows of run, target, step and seconds.
    """
    curves = [(run.name, run.scalars[tags[0]]) for run in runs if (tags := loss_tags(run))]
    return _levels(curves, targets, False)


def convergence_of(runs: Sequence[Run], levels: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """Return when each run first reached each level of each metric: of those whose names tell which way is better.

    Args:
        runs: The runs.
        levels: Levels by name of a metric; metrics that it lacks get three of their own, as losses do.

    Returns:
        Rows of metric, run, level, step and seconds.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    validated = {quantity_of(name) for name in names if split_of(name) == "validation"}
    rows = []
    for name in names:
        chosen = split_of(name) == "validation" or quantity_of(name) not in validated
        higher = is_better_higher(name)
        if name not in levels and (higher is None or not chosen or split_of(name) == "test"):
            continue
        curves = [(run.name, run.scalars[name]) for run in runs if name in run.scalars]
        if name in levels or max(len(points) for _, points in curves) > 2:
            rows += [[name, *row] for row in _levels(curves, levels.get(name), bool(higher))]
    return rows


def _levels(curves: Sequence[tuple[str, Points]], targets: Sequence[float] | None, higher: bool) -> list[list[str]]:
    values = [value for _, points in curves for _, value, _ in finite(points)]
    if not values:
        return []
    if targets is None:
        starts = [points[0][1] for _, points in curves if finite(points[:1])] or values
        first, best = median(starts), (max if higher else min)(values)
        targets = [best + (first - best) * share for share in _SHARES]
    rows = []
    for target in targets:
        for name, points in curves:
            found = reached(points, target, higher)
            rows.append([name, f"{target:.4g}", *((f"{found[0]:,}", f"{found[1]:.1f}") if found else ("never", "-"))])
    return rows


def generalisation(runs: Iterable[Run]) -> list[list[str]]:
    """Return rows of run, validation loss, step, training loss and their gap, at each run's best validation loss."""
    rows = []
    for run in runs:
        tags = loss_tags(run)
        held_out = next((tag for tag in tags if split_of(tag) == "validation"), None)
        if held_out is None or tags[0] == held_out or (best := best_of(run.scalars[held_out], False)) is None:
            continue
        step, value, _ = best
        training = min(run.scalars[tags[0]], key=lambda point: abs(point[0] - step))[1]
        rows.append([run.name, f"{value:.4g}", f"{step:,}", f"{training:.4g}", f"{value - training:+.4g}"])
    return rows


def generalisation_of(runs: Sequence[Run]) -> list[list[str]]:
    """Return rows of metric, run, best validation value, step, training value and gap, of all metrics but the loss."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.metrics if split_of(name) == "validation"):
        higher = is_better_higher(name)
        if higher is None or quantity_of(name) == "loss":
            continue
        for run in runs:
            best = best_of(run.scalars.get(name, []), higher)
            if best is None:
                continue
            step, value, _ = best
            training = training_name(name, run.metrics)
            row = ["-", "-"]
            if training is not None:
                seen = min(run.scalars[training], key=lambda point: abs(point[0] - step))[1]
                row = [f"{seen:.4g}", f"{(seen - value if higher else value - seen):+.4g}"]
            rows.append([name, run.name, f"{value:.4g}", f"{step:,}", *row])
    return rows


def stability(runs: Iterable[Run]) -> list[list[str]]:
    """Return rows of run, skipped steps, rollbacks, cuts of the rate, spike scores, and the last rate of each group.

    The numbers are those of the last report. The rates are those that its step used, after schedule and cut.
    """
    rows = []
    for run in runs:
        values = {name: last_of(run, name) for name in ACTS.values()}
        if any(value is not None for value in values.values()):
            rates = [f"{tag.removeprefix('optim_lr/')} {run.scalars[tag][-1][1]:.3g}" for tag in group_tags(run, "lr")]
            cells = [
                "-" if v is None else f"{v:.3%}" if n.startswith("spike") else f"{v:.0f}" for n, v in values.items()
            ]
            rows.append([run.name, *cells, ", ".join(rates) or "-"])
    return rows


def group_tags(run: Run, quantity: str) -> list[str]:
    """Return the tags of a quantity for each group, without totals."""
    stem = f"optim_{quantity}/"
    rest = {tag: tag.removeprefix(stem) for tag in run.scalars if tag.startswith(stem)}
    not_groups = r"(.*\.)?(total|interval_(max|mean))"
    return [tag for tag, name in rest.items() if "/" not in name and not re.fullmatch(not_groups, name)]


def of_all_optimizers(run: Run, name: str) -> list[Points]:
    """Return the curves of a tag of ``optim_health``: the run's, or else those of each optimizer."""
    if points := run.scalars.get(f"optim_health/{name}"):
        return [points]
    return [points for tag, points in run.scalars.items() if points and re.fullmatch(rf"optim_health/.+\.{name}", tag)]


def last_of(run: Run, name: str) -> float | None:
    """Return the last value of a tag of the run, else the sum of those of its optimizers; None if there is none."""
    curves = of_all_optimizers(run, name)
    return sum(points[-1][1] for points in curves) if curves else None


def increases(run: Run, name: str) -> list[tuple[int, int]]:
    """Return at which steps a count grew, and by how much; of a count that starts above 0 as well."""
    found = []
    for points in of_all_optimizers(run, name):
        before = 0.0
        for step, value, _ in points:
            if value > before:
                found.append((step, int(value - before)))
            before = value
    return sorted(found)
