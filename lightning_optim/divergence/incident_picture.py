"""Picture of an incident: the curves of its steps, with alarms and responses marked; needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from textwrap import shorten, wrap
from typing import Any

import numpy as np

from lightning_optim.divergence.incidents import Incident, SeenStep
from lightning_optim.divergence.report import Entry

_MOST_GROUPS = 8
"""Largest number of groups that have a line in the legend; the others are thin and grey."""
_LARGEST = 1e150
"""Axes of larger values overflow in matplotlib."""
_WIDE = 5
"""Ratio of the largest to the smallest value beyond which a logarithmic axis is the clearer one."""
_LABELS = {"loss": "loss", "grad_norm": "gradient norm"}
_DASHES = ("-", "--", "-.", ":")
_COLOURS = ("tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(incident: Incident, entries: Sequence[Entry], group_names: Sequence[Sequence[str]] = ()) -> Any:
    """Draw loss, gradient norm with its median and limit, the groups' norms, and the learning rate over the steps.

    Args:
        incident: The incident, with at least one step.
        entries: Its alarms and responses.
        group_names: Names of the groups of each optimizer; empty if they are not known.

    Returns:
        A figure of matplotlib.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = incident.steps
    optimizers = sorted({row.optimizer for row in rows})
    panels: list[Callable[..., None]] = [_loss, _norm]
    if any(len(row.seen.group_norms) > 1 for row in rows):
        panels.append(partial(_groups, group_names))
    if any(math.isfinite(row.seen.rate) for row in rows):
        panels.append(_rate)
    height = 2 * len(panels) + 0.8
    figure = Figure(figsize=(9, height))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for index in optimizers:
            of = f" of optimizer {index}" if len(optimizers) > 1 else ""
            panel(axis, [row for row in rows if row.optimizer == index], of)
        _mark_alarms(axis, entries, has_labels=axis is axes[0])
        axis.grid(alpha=0.3)
        axis.tick_params(which="both", labelsize=7)
        axis.yaxis.set_label_coords(-0.085, 0.5)
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.03))
        responses = _mark_responses(axis, entries)
    if responses:
        figure.legend(handles=responses, fontsize=7, loc="lower right", title="responses", title_fontsize=7)
    axes[-1].set_xlabel("step", fontsize=8)
    # A layout of matplotlib's own would double the time.
    figure.subplots_adjust(0.1, 0.45 / height, 0.74, 1 - 0.35 / height, hspace=0.12)
    figure.suptitle(shorten(incident.title(), 110), fontsize=10)
    return figure


def as_png(figure: Any) -> bytes:
    """Return a figure as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def as_pixels(figure: Any) -> Any:
    """Return a figure as pixels, uint8, shape [height, width, 3]."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _loss(axis: Any, rows: Sequence[SeenStep], of: str) -> None:
    _signal(axis, rows, "loss", of)


def _norm(axis: Any, rows: Sequence[SeenStep], of: str) -> None:
    _signal(axis, rows, "grad_norm", of)


def _signal(axis: Any, rows: Sequence[SeenStep], signal: str, of: str) -> None:
    """Draw a signal with its median and its limit; skipped steps, and values that are not finite, get a mark."""
    steps = [row.at for row in rows]
    values = [row.seen.values[signal] for row in rows]
    (line,) = axis.plot(steps, _finite(values), linewidth=1, marker=".", markersize=3, label=f"{_LABELS[signal]}{of}")
    colour = line.get_color()
    for style, label, known in (
        ("--", "median", [row.seen.medians[signal] for row in rows]),
        (":", "limit of a spike", [row.seen.limits.get(signal, math.inf) for row in rows]),
    ):
        if any(map(math.isfinite, known)):
            axis.plot(steps, _finite(known), style, color=colour, linewidth=1, alpha=0.7, label=f"{label}{of}")
    shown = [value for value in values if abs(value) < _LARGEST]
    if shown and min(shown) > 0 and max(shown) > _WIDE * min(shown):
        axis.set_yscale("log")
    skipped = [(row.at, value) for row, value in zip(rows, values, strict=True) if row.seen.skipped]
    if high := [(at, value) for at, value in skipped if math.isfinite(value)]:
        axis.plot(*zip(*high, strict=True), "x", color="tab:red", markersize=6, label=f"skipped{of}")
    if lost := [at for at, value in zip(steps, values, strict=True) if not math.isfinite(value)]:
        top = [0.97] * len(lost)  # They have no height of their own.
        across = axis.get_xaxis_transform()
        axis.plot(lost, top, "v", color="tab:red", markersize=5, transform=across, label=f"not finite{of}")
    axis.set_ylabel(_LABELS[signal], fontsize=8)


def _groups(group_names: Sequence[Sequence[str]], axis: Any, rows: Sequence[SeenStep], of: str) -> None:
    index = rows[0].optimizer
    names = group_names[index] if index < len(group_names) else ()
    most = max(len(row.seen.group_norms) for row in rows)
    for group in range(most):
        norms = [row.seen.group_norms[group] if group < len(row.seen.group_norms) else math.nan for row in rows]
        name = names[group] if len(names) == most else f"group {group}"
        look = {"label": f"{name}{of}"} if most <= _MOST_GROUPS else {"color": "grey", "alpha": 0.5}
        axis.plot([row.at for row in rows], _finite(norms), linewidth=1, **look)
    axis.set_yscale("log")
    axis.set_ylabel("groups' gradient norms", fontsize=8)


def _rate(axis: Any, rows: Sequence[SeenStep], of: str) -> None:
    rates = _finite([row.seen.rate for row in rows])
    axis.plot([row.at for row in rows], rates, drawstyle="steps-mid", linewidth=1, label=f"rate{of}")
    axis.set_ylabel("highest learning rate", fontsize=8)
    axis.set_ylim(bottom=0)


def _mark_alarms(axis: Any, entries: Sequence[Entry], has_labels: bool) -> None:
    """Draw a line at each alarm, one colour for each kind."""
    kinds = list(dict.fromkeys(entry.kind for entry in entries if entry.kind != "did"))
    for place, kind in enumerate(kinds):
        steps = sorted({entry.step for entry in entries if entry.kind == kind})
        colour = _COLOURS[place % len(_COLOURS)]
        for number, step in enumerate(steps):
            label = f"alarm: {kind}" if has_labels and number == 0 else None
            axis.axvline(step, color=colour, linewidth=0.8, linestyle=":", alpha=0.8, label=label)


def _mark_responses(axis: Any, entries: Sequence[Entry]) -> list[Any]:
    """Draw a thick line at each response, and return the lines with what was done as label."""
    lines = []
    for number, entry in enumerate(entry for entry in entries if entry.kind == "did"):
        label = "\n".join(wrap(f"step {entry.step}: {entry.text}", 40, max_lines=3))
        dashes = _DASHES[number % len(_DASHES)]
        look = {"color": "tab:green", "linewidth": 2, "linestyle": dashes, "alpha": 0.7}
        lines.append(axis.axvline(entry.step, label=label, **look))
    return lines


def _finite(values: Sequence[float]) -> list[float]:
    """Return the values with NaN, which makes a gap in a line, for those that are not finite or cannot be drawn."""
    return [value if abs(value) < _LARGEST else math.nan for value in values]
