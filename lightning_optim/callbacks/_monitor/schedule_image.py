"""The planned schedules of an optimizer as one picture: the learning rate of each group, then what else follows one."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_optim.core.durations import Horizon
from lightning_optim.factory.plan import plan_curves
from lightning_optim.schedules import Scheduler

_POINTS = 600
_LONGEST = 40
_APART = 20.0
"""Ratio of two groups' peaks from which on the axis is logarithmic: else the lower one would lie on the zero line."""


def schedule_image(scheduler: Scheduler, horizon: Horizon, step: int) -> Any:
    """Draw the schedules of all groups, with a line at ``step``.

    Args:
        scheduler: The scheduler.
        horizon: Length of the run.
        step: Where the run is.

    Returns:
        uint8, shape [height, width, 3]; None without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    rates = group_rates(scheduler, horizon)
    others = [curve for curve in plan_curves(scheduler) if not curve.label.startswith("lr")]
    figure = Figure(figsize=(7, 2.8 + 2.2 * len(others)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1 + len(others), 1, squeeze=False, sharex=True)[:, 0]
    last = horizon.total_steps or 1000
    steps = np.unique(np.linspace(0, max(last - 1, 1), _POINTS).astype(int)).tolist()
    peaks = []
    for label, values in rates.items():
        curve = [values(at) for at in steps]
        peaks.append(max(curve))
        panels[0].plot(steps, curve, label=label)
    positive = [peak for peak in peaks if peak > 0]
    if positive and max(positive) > _APART * min(positive):
        panels[0].set_yscale("log")
    else:
        panels[0].set_ylim(bottom=0)
    panels[0].set_title("learning rate" if len(rates) < 2 else "learning rate of each group", fontsize=10)
    if len(rates) > 1:
        panels[0].legend(fontsize=8)
    for panel, other in zip(panels[1:], others, strict=True):
        panel.plot(steps, [other.values(at) for at in steps])
        panel.set_title(other.label, fontsize=10)
    for panel in panels:
        panel.axvline(step, color="tab:red", linewidth=1)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("optimizer step")
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def group_rates(scheduler: Scheduler, horizon: Horizon) -> dict[str, Any]:
    """Return the learning rate of each group as a function of the step, by its name; equal ones are one.

    Args:
        scheduler: The scheduler.
        horizon: Length of the run.
    """
    own = scheduler.group_schedules
    found: dict[tuple[float, str], tuple[list[str], Any]] = {}
    for index, group in enumerate(scheduler.optimizer.param_groups):
        name = str(group.get("name", index))
        peak, schedule = float(group["initial_lr"]), own.get(name, scheduler.schedule)
        names, _ = found.setdefault((peak, repr(schedule)), ([], _rate(peak, schedule, horizon)))
        names.append(name)
    return {_label(names): rate for names, rate in found.values()}


def _rate(peak: float, schedule: Any, horizon: Horizon) -> Any:
    multiplier = schedule.for_peak(peak).over(horizon)
    return lambda step: peak * multiplier(step)


def _label(names: list[str]) -> str:
    text = ", ".join(names).replace("$", r"\$")
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return f" {text}" if text.startswith("_") else text  # to matplotlib it would be no label
