"""Which charts a report has: curves of all runs in one chart, by their names, with what happened marked on them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_optim.diagnostics.metric_names import is_better_higher, quantity_of, split_of
from lightning_optim.diagnostics.run_report.analysis import finite, group_tags, increases, of_all_optimizers
from lightning_optim.diagnostics.run_report.run import Points, Run

MOST_POINTS = 1200
_MOST_LINES = 8
"""Largest number of lines that a chart of several runs shows at first."""
_CLIPPED = 0.5
"""Share of clipped steps from which on a curve is marked."""

EVENTS = {
    "skipped_steps": ("skip", "step skipped", "steps skipped"),
    "lr_cuts": ("cut", "cut of the rate", "cuts of the rate"),
    "rollbacks": ("rollback", "rollback", "rollbacks"),
}
"""Kind, singular and plural of an event, by its count in ``optim_health``."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        run: Index of its run.
        series: What it is of: a metric or a group.
        points: Its points.
        dash: ``"solid"``, or ``"dashed"`` for validation, or ``"dotted"`` for what stands beside the main curve.
    """

    run: int
    series: str
    points: Points
    dash: str = "solid"


@dataclass(frozen=True)
class Band:
    """The spread around a curve.

    Args:
        run: Index of the curve's run.
        series: The curve's series.
        low: Points of its lower edge.
        high: Points of its upper edge, at the same steps.
    """

    run: int
    series: str
    low: Points
    high: Points


@dataclass(frozen=True)
class Mark:
    """An event on a curve.

    Args:
        run: Index of the run.
        kind: ``"skip"``, ``"cut"`` or ``"rollback"``.
        step: Its step.
        value: The curve's value there.
        text: What happened.
    """

    run: int
    kind: str
    step: int
    value: float
    text: str


@dataclass
class Chart:
    """One chart.

    Args:
        title: Title.
        lines: Its curves.
        note: What to look for.
        wide: Whether it takes the width of the page.
        log: Whether its axis is logarithmic.
        shown: The series that are visible at first.
        marks: Events on its curves.
        clipped: Where at least half of the steps were clipped, as pieces of the curves.
        bands: Spreads around its curves.
        axis: ``"step"``, or ``"seconds"``.
    """

    title: str
    lines: list[Line]
    note: str = ""
    wide: bool = False
    log: bool = False
    shown: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    clipped: list[Line] = field(default_factory=list)
    bands: list[Band] = field(default_factory=list)
    axis: str = "step"

    @property
    def series(self) -> list[str]:
        """The names of its series, in order."""
        return list(dict.fromkeys(line.series for line in self.lines))


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of the runs, those left out that have no curve, or nothing but zeros."""
    charts = [_loss(runs), *_metrics(runs)]
    for title, note, log, lines_of in _QUANTITIES:
        lines = [
            Line(i, series, run.scalars[tag], dash) for i, run in enumerate(runs) for tag, series, dash in lines_of(run)
        ]
        charts.append(Chart(title, lines, note, log=log and _spans(lines, 30)))
    for chart in charts:
        chart.lines = [line for line in chart.lines if finite(line.points)]
        if chart.title == "Learning rate":
            peaks = [max(value for _, value, _ in finite(line.points)) for line in chart.lines]
            peaks = [peak for peak in peaks if peak > 0]
            chart.log = bool(peaks) and max(peaks) >= 5 * min(peaks)
        chart.shown = _first(chart, len(runs))
    return [chart for chart in charts if any(value for line in chart.lines for _, value, _ in line.points)]


def _first(chart: Chart, runs: int) -> list[str]:
    """Return the series to show at first: all, or as many of each run as can be told apart."""
    names = chart.series
    if len(chart.lines) <= _MOST_LINES:
        return names
    solid = [name for name in names if any(line.series == name and line.dash != "dotted" for line in chart.lines)]
    if chart.wide:
        return solid
    room = max(_MOST_LINES // runs, 1)
    first = sorted(solid or names, key=lambda name: (name != "default", names.index(name)))
    return first[:room]


def _loss(runs: Sequence[Run]) -> Chart:
    chart = Chart("Loss", [], "Solid: training. Dashed: validation.", wide=True)
    for index, run in enumerate(runs):
        own = [name for name in run.metrics if quantity_of(name) == "loss"]
        main: Points = []
        if points := run.scalars.get("optim_loss/mean"):
            chart.lines.append(Line(index, "training (mean of all batches)", points))
            main = points
        for name in sorted(own, key=lambda name: split_of(name) == "validation"):
            training = split_of(name) in ("training", "")
            # The mean of all batches shows the same with less noise.
            dash = "dashed" if not training else "dotted" if main else "solid"
            chart.lines.append(Line(index, name, run.scalars[name], dash))
            main = main or run.scalars[name]
        if points := run.scalars.get("optim_loss/max"):
            chart.lines.append(Line(index, "largest of all batches", points, "dotted"))
        chart.marks += _marks(run, index, main)
        chart.clipped += _clipped(run, index, main)
    chart.log = _spans([line for line in chart.lines if line.dash != "dotted"], 10)
    return chart


def _metrics(runs: Sequence[Run]) -> list[Chart]:
    quantities: dict[str, Chart] = {}
    for index, run in enumerate(runs):
        for name in run.metrics:
            quantity = quantity_of(name)
            if quantity == "loss":
                continue
            chart = quantities.setdefault(quantity or name, Chart(quantity or name, [], wide=True))
            dash = "dashed" if split_of(name) in ("validation", "test") else "solid"
            chart.lines.append(Line(index, name, run.scalars[name], dash))
    for chart in quantities.values():
        chart.log = is_better_higher(chart.title) is not True and _spans(chart.lines, 30)
        better = is_better_higher(chart.title)
        chart.note = "" if better is None else "Higher is better." if better else "Lower is better."
    if len(quantities) > 2:  # So many are read side by side.
        for chart in quantities.values():
            chart.wide = False
    return list(quantities.values())


def _spans(lines: Iterable[Line], factor: float) -> bool:
    """Return whether the values are positive and span more than a factor, single points aside."""
    values = sorted(value for line in lines for _, value, _ in finite(line.points))
    if len(values) < 2 or values[0] < 0:
        return False
    positive = [value for value in values if value > 0]
    if len(positive) < 0.9 * len(values):
        return False
    low, high = positive[len(positive) // 50], positive[-1 - len(positive) // 50]
    return high > factor * low


def _marks(run: Run, index: int, curve: Points) -> list[Mark]:
    marks = []
    for name, (kind, one, several) in EVENTS.items():
        for step, count in increases(run, name):
            if (value := _value_at(curve, step)) is not None:
                marks.append(Mark(index, kind, step, value, f"{count} {one if count == 1 else several}"))
    return marks


def _value_at(curve: Points, step: int) -> float | None:
    """Return the finite value next to a step."""
    known = finite(curve)
    return min(known, key=lambda point: abs(point[0] - step))[1] if known else None


def _clipped(run: Run, index: int, curve: Points) -> list[Line]:
    rates = {step: value for points in of_all_optimizers(run, "clip_rate") for step, value, _ in points}
    marked = [(s, v if rates.get(s, 0.0) >= _CLIPPED else math.nan, t) for s, v, t in curve]
    return [Line(index, "clipped", marked)] if finite(marked) else []


_Curves = Callable[[Run], list[tuple[str, str, str]]]


def _groups(quantity: str) -> _Curves:
    """Tag, name and dash of a quantity's curve for each group."""
    family, _, part = quantity.partition("/")

    def of(run: Run) -> list[tuple[str, str, str]]:
        if not part:
            return [(tag, tag.split("/", 1)[1], "solid") for tag in group_tags(run, family)]
        pattern = re.compile(rf"optim_{family}/(?:(?P<optimizer>[^/]+)\.)?{part}/(?P<group>.+)")
        found = [(tag, match) for tag in run.scalars if (match := pattern.fullmatch(tag))]
        return [(tag, ".".join(filter(None, match.group("optimizer", "group"))), "solid") for tag, match in found]

    return of


def _named(*tags: tuple[str, str, str]) -> _Curves:
    """Tag, name and dash of curves that exist once, or once for each optimizer."""

    def of(run: Run) -> list[tuple[str, str, str]]:
        found = []
        for tag, name, dash in tags:
            family, _, last = tag.partition("/")
            for present in run.scalars:
                if match := re.fullmatch(rf"{family}/(?:([^/]+)\.)?{last}", present):
                    found.append((present, name if match[1] is None else f"{match[1]}: {name}", dash))
        return found

    return of


def _gaps(run: Run) -> list[tuple[str, str, str]]:
    stem = "optim_generalization_gap/"
    return [(tag, tag.removeprefix(stem), "solid") for tag in run.scalars if tag.startswith(stem)]


_QUANTITIES: list[tuple[str, str, bool, _Curves]] = [
    ("Gap between validation and training", "Above 0: validation is worse than training.", False, _gaps),
    ("Learning rate", "As the steps used it, after schedule and cut.", True, _groups("lr")),
    (
        "Gradient norm",
        "Of all groups together.",
        True,
        _named(
            ("optim_grad_norm/total", "before clipping", "solid"),
            ("optim_grad_norm_clipped/total", "after clipping", "dashed"),
            ("optim_grad_norm/interval_max", "largest since the last report", "dotted"),
        ),
    ),
    (
        "Clipped steps",
        "Share since the last report. Close to 1, clipping has become the learning rate.",
        False,
        _named(("optim_health/clip_rate", "share of clipped steps", "solid")),
    ),
    (
        "Update over parameters",
        "Around 0.001 as a rule of thumb; look for a group far from the others.",
        True,
        _groups("update_ratio"),
    ),
    ("Gradient norm of each group", "", True, _groups("grad_norm")),
    ("Effective learning rate", "Root mean square of the changes of a group's weights.", True, _groups("lr/effective")),
    (
        "Cosine of gradient and momentum",
        "Near 1 steps could be longer; below 0 they overshoot.",
        False,
        _groups("grad/cosine"),
    ),
    (
        "Gradient over second moment",
        "About 1; it rises some steps before a spike.",
        True,
        _groups("grad/over_second_moment"),
    ),
    (
        "Spike score",
        "Share of steps so far that were spikes.",
        False,
        _named(
            ("optim_health/spike_score_loss", "of the loss", "solid"),
            ("optim_health/spike_score_grad_norm", "of the gradient norm", "dashed"),
        ),
    ),
    (
        "Steps per second",
        "Without validation.",
        False,
        _named(("optim_speed/steps_per_second", "steps per second", "solid")),
    ),
]
"""Title, note, whether the axis may be logarithmic, and the curves of each chart of the optimizer."""


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most about ``most`` points, of which extremes and gaps stay.

    Args:
        points: The points of a curve.
        most: Their number.
    """
    if len(points) <= most:
        return points
    size = -(-len(points) // (most // 2))
    found: list[Any] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        known = finite(part) or part[:1]
        ends = {min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])}
        if len(known) < len(part):
            ends |= set(next([p] for p in part if not math.isfinite(p[1])))
        found += sorted(ends, key=lambda point: point[0])
    return found
