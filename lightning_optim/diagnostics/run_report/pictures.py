"""The charts of a report as PNG, by matplotlib."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any

from lightning_optim.diagnostics.run_report.charts import Chart, thinned
from lightning_optim.diagnostics.run_report.run import Run

COLOURS = (
    "#2f7ed8", "#e07b00", "#1f9d55", "#d6336c", "#8e5bd0", "#0fa3a3", "#a98600", "#7a6a5d", "#e05252", "#5c7cfa",
)  # fmt: skip
"""Colours of lines, which can be told apart on a light and on a dark page."""

_DASHES = {"solid": "-", "dashed": "--", "dotted": ":"}
_MARKERS = {"skip": "x", "cut": "v", "rollback": "D"}
_LONGEST = 60


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def draw(chart: Chart, runs: Sequence[Run]) -> bytes:
    """Draw a chart, all runs in one panel.

    Args:
        chart: The chart.
        runs: The runs that it is of.

    Returns:
        PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panel: Any = figure.subplots()
    series = chart.series
    handles = {}
    for line in chart.lines:
        if line.series not in chart.shown:
            continue
        points = thinned(line.points)
        steps, values, seconds = zip(*points, strict=True)
        steps = steps if chart.axis == "step" else seconds
        colour = colour_of(line.run if len(runs) > 1 else series.index(line.series))
        (handle,) = panel.plot(steps, values, linestyle=_DASHES[line.dash], color=colour, linewidth=1.4)
        if len(points) < 20:
            handle.set_marker(".")
        shown = len({each.series for each in chart.lines if each.series in chart.shown})
        label = line.series if len(runs) == 1 else runs[line.run].name
        handles[f"{label}: {line.series}" if len(runs) > 1 and shown > 1 else label] = handle
    for band in chart.bands:
        if band.series in chart.shown:
            x = [point[0 if chart.axis == "step" else 2] for point in band.low]
            colour = colour_of(band.run if len(runs) > 1 else series.index(band.series))
            edges = [[value for _, value, _ in edge] for edge in (band.low, band.high)]
            panel.fill_between(x, *edges, color=colour, alpha=0.16, linewidth=0)
    for mark in chart.marks:
        panel.plot([mark.step], [mark.value], _MARKERS[mark.kind], color="#d62728", markersize=6)
    if chart.log:
        panel.set_yscale("log")
    panel.set_title(chart.title.replace("$", r"\$"), fontsize=10)
    panel.set_xlabel(chart.axis)
    panel.grid(alpha=0.3)
    if len(handles) > 1 or len(runs) > 1:
        labels = [plain_label(label) for label in handles]
        figure.legend(list(handles.values()), labels, loc="outside right upper", fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def colour_of(place: int) -> str:
    """Return a colour; after the last one the first again."""
    return COLOURS[place % len(COLOURS)]


def plain_label(label: str) -> str:
    """Return a label that matplotlib shows as it is: to it ``$`` is mathematics, and ``_`` in front hides a name."""
    short = label if len(label) <= _LONGEST else f"{label[: _LONGEST // 2]}…{label[-_LONGEST // 2 :]}"
    short = short.replace("$", r"\$")
    return f" {short}" if short.startswith("_") else short


def file_name(title: str, taken: set[str]) -> str:
    """Return the name of a picture's file, short enough for any file system and not yet taken.

    Args:
        title: Title of the picture.
        taken: Names that are taken, to which this one is added.
    """
    name = re.sub("[^a-z0-9]+", "_", title.lower()).strip("_") or "picture"
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}_{hashlib.sha1(title.encode()).hexdigest()[:8]}"
    stem, number = name, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return f"{name}.png"
