"""Activations and gradients by depth as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_optim.tuning.inspection.inspection import Inspection

MISSING = "The picture needs matplotlib: pip install 'lightning-optim[plot]'"
_MOST_LABELS = 40


def draw_inspection(inspection: Inspection, path: str | Path) -> None:
    """Draw one panel of activations and one of gradients, places in the order of execution.

    Args:
        inspection: What was seen.
        path: Where to write the PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    rows = inspection.rows
    figure = new_figure((max(6.0, min(0.28 * len(rows) + 2, 16.0)), 7.0))
    panels: Any = figure.subplots(2, 1, sharex=True)
    marked = {name for finding in inspection.findings for name in (finding.where, *finding.further)}
    _lines(
        panels[0],
        "activations",
        {"RMS of outputs": [r.rms for r in rows], "what differs between samples": [r.signal for r in rows]},
    )
    weights = [math.nan if r.weight_gradient_rms is None else r.weight_gradient_rms for r in rows]
    _lines(panels[1], "gradients", {"RMS, of outputs": [r.gradient_rms for r in rows], "RMS, of parameters": weights})
    for index, row in enumerate(rows):
        if row.name in marked or any(name.rpartition(".")[0] == row.name for name in marked):
            for panel in panels:
                panel.axvline(index, color="#d6336c", alpha=0.25, linewidth=4)
    every = max(1, math.ceil(len(rows) / _MOST_LABELS))
    panels[1].set_xticks(range(0, len(rows), every))
    panels[1].set_xticklabels([row.name for row in rows[::every]], rotation=90, fontsize=7)
    figure.savefig(str(path), dpi=110, format="png")


def _lines(panel: Any, title: str, lines: dict[str, Sequence[float]]) -> None:
    colours = ("#2f7ed8", "#e07b00")
    for (label, values), colour in zip(lines.items(), colours, strict=True):
        shown = [(i, v) for i, v in enumerate(values) if math.isfinite(v) and v > 0]
        if shown:
            panel.plot(*zip(*shown, strict=True), marker=".", color=colour, linewidth=1.2, label=label)
    if panel.lines:
        panel.set_yscale("log")
        panel.legend(fontsize=8)
    panel.set_title(title, fontsize=10, loc="left")
    panel.grid(alpha=0.3)


def new_figure(size: tuple[float, float]) -> Any:
    """Return a figure that needs no display.

    Args:
        size: Width and height in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
