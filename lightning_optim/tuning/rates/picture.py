"""Pictures of what a sweep or trials told: as PNG, as pixels for a logger, and in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_optim.core.block_plot import block_rows
from lightning_optim.tuning.rates.found import FoundRate
from lightning_optim.tuning.rates.halving import Trial
from lightning_optim.tuning.rates.rate_trials import RateTrials
from lightning_optim.tuning.rates.suggestion import Suggestion

__all__ = ["draw_in_terminal", "pixels", "save_picture"]

_ROWS = 8
_CURVES = 8
"""Trials whose losses are drawn; more would hide each other."""


def draw_in_terminal(rate: FoundRate, width: int = 72) -> str:
    """Draw the loss against the rate with block characters; below it the interval and the suggested rate.

    Args:
        rate: What was found about an optimizer.
        width: Columns of the area, at least 20.
    """
    rates, losses, title = _curve(rate.evidence)
    lines = [f"{rate.name}: {title}"]
    if len(rates) < 2:
        return "\n".join([*lines, "(nothing to draw)"])
    width = max(width, 20)
    places = np.linspace(math.log(rates[0]), math.log(rates[-1]), width)
    if isinstance(rate.evidence, Suggestion):
        values = np.interp(places, np.log(rates), losses)
    else:  # A bar around each rate that was tried.
        values = losses[np.argmin(np.abs(places[:, None] - np.log(rates)[None, :]), axis=1)]
    low, high = float(np.min(losses)), float(np.max(losses))
    # An eighth of a line for the least loss, so that it is not taken for nothing.
    shares = 0.02 + 0.98 * (values - low) / (high - low) if high > low else np.full(width, 0.5)
    margin = max(len(f"{low:.4g}"), len(f"{high:.4g}"))
    labels = [f"{high:.4g}", *[""] * (_ROWS - 2), f"{low:.4g}"]
    areas = block_rows([float(share) for share in shares], _ROWS)
    lines += [f"{label.rjust(margin)} |{area}".rstrip() for label, area in zip(labels, areas, strict=True)]
    marks = [" "] * width

    def column(value: float) -> int:
        share = float((math.log(value) - places[0]) / (places[-1] - places[0]))
        return min(max(round(share * (width - 1)), 0), width - 1)

    if rate.low is not None and rate.high is not None:
        marks[column(rate.low) : column(rate.high) + 1] = ["-"] * (column(rate.high) + 1 - column(rate.low))
    if rate.lr is not None:
        marks[column(rate.lr)] = "^"
    if text := "".join(marks).rstrip():
        lines.append(f"{' ' * margin}  {text}")
    lines.append(f"{' ' * margin}  {f'{rates[0]:.2g}'}{f'lr {rates[-1]:.2g}'.rjust(width - len(f'{rates[0]:.2g}'))}")
    if rate.lr is not None:
        within = "" if rate.low is None else f", - {rate.low:.2g} to {rate.high:.2g}"
        lines.append(f"{' ' * margin}  ^ {rate.lr:.3g}{within}")
    return "\n".join(lines)


def _curve(evidence: Suggestion | RateTrials) -> tuple[np.ndarray, np.ndarray, str]:
    """Rates, losses and what they are; trials that diverged are left out."""
    if isinstance(evidence, Suggestion):
        seen = np.isfinite(evidence.smoothed)
        return evidence.rates[seen], evidence.smoothed[seen], "smoothed loss of the sweep against the rate"
    trials = [trial for trial in evidence.longest.values() if not trial.diverged]
    rates, scores = np.array([t.value for t in trials]), np.array([t.score for t in trials])
    return rates, scores, "loss at the end of each rate's longest trial"


def save_picture(found: Sequence[FoundRate], path: str | Path) -> None:
    """Draw what was found into a PNG, a row for each optimizer.

    Args:
        found: What was found.
        path: The file, whose folder is made.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = _figure(found)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=120)


def pixels(found: Sequence[FoundRate]) -> np.ndarray:
    """Draw what was found as pixels, uint8 `[height, width, 3]`.

    Args:
        found: What was found.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = _figure(found)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _figure(found: Sequence[FoundRate]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("A picture needs matplotlib: pip install 'lightning-optim[plot]'") from error
    columns = 2 if any(isinstance(rate.evidence, RateTrials) for rate in found) else 1
    figure = Figure(figsize=(6.5 * columns, 3.4 * max(len(found), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(max(len(found), 1), columns, squeeze=False)
    for rate, row in zip(found, panels, strict=False):
        if isinstance(rate.evidence, Suggestion):
            _draw_sweep(row[0], rate.evidence)
        else:
            _draw_trials(row[0], row[1], rate.evidence)
        _mark(row[0], rate)
        row[0].set_title(f"{rate.name}: {'cannot tell' if rate.lr is None else f'lr {rate.lr:.3g}'}", fontsize=10)
        for panel in row:
            panel.set_ylabel("loss")
            panel.grid(alpha=0.3)
    return figure


def _draw_sweep(panel: Any, sweep: Suggestion) -> None:
    panel.plot(sweep.rates, sweep.losses, ".", markersize=3, color="tab:gray", label="loss of a step")
    panel.plot(sweep.rates, sweep.smoothed, color="tab:blue", label="smoothed")
    panel.set_xscale("log")
    panel.set_xlabel("learning rate")


def _draw_trials(panel: Any, beside: Any, trials: RateTrials) -> None:
    lengths = sorted({trial.steps for trial in trials.trials})
    for length in lengths:
        own = sorted((t for t in trials.trials if t.steps == length), key=lambda trial: trial.value)
        going = [trial for trial in own if not trial.diverged]
        line = panel.plot([t.value for t in going], [t.score for t in going], ".-", label=f"after {length} steps")
        top = max((trial.score for trial in going), default=0.0)
        lost = [trial.value for trial in own if trial.diverged]
        if lost:
            panel.plot(lost, [top] * len(lost), "x", color=line[0].get_color())
    panel.set_xscale("log")
    panel.set_xlabel("learning rate (x: diverged)")
    longest = sorted((t for t in trials.trials if t.steps == lengths[-1] and t.losses), key=lambda trial: trial.score)[
        :_CURVES
    ]
    for trial in sorted(longest, key=lambda trial: trial.value):
        beside.plot(_smoothed(trial), label=f"{trial.value:.2g}", linewidth=1)
    beside.set_xlabel("step of the trial")
    if longest:
        beside.legend(fontsize=7, title="lr", title_fontsize=7)


def _smoothed(trial: Trial[float]) -> np.ndarray:
    """Losses of a trial, averaged over twenty steps at most."""
    losses = np.asarray(trial.losses)
    window = max(min(len(losses) // 5, 20), 1)
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def _mark(panel: Any, rate: FoundRate) -> None:
    if rate.low is not None and rate.high is not None:
        panel.axvspan(rate.low, rate.high, color="tab:green", alpha=0.15, label="interval")
    if rate.lr is not None:
        panel.axvline(rate.lr, color="tab:green", label="suggested")
    panel.axvline(rate.configured, color="tab:red", linestyle=":", label="configured")
    panel.legend(fontsize=7)
