"""What a fit writes down while it runs: training losses, validation metrics, and facts about it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

Points = list[tuple[int, float, float]]
"""Points of a curve: step, value, and seconds of training; those of `lightning_optim.diagnostics.run_report`."""

CURVE_FILE = "curve.csv"
"""Training loss of each optimizer step: step, seconds, loss."""
VALIDATION_FILE = "validation.jsonl"
"""A line for each validation: step, seconds, epoch, metrics."""
FACTS_FILE = "facts.json"

_WINDOW = 48
_SPIKE = 8.0


def read_curve(folder: Path) -> Points:
    """Return the training loss of each optimizer step of a run; a line that was cut off is left out."""
    found = []
    for line in _lines(folder / CURVE_FILE)[1:]:
        cells = line.split(",")
        try:
            found.append((int(cells[0]), float(cells[2]), float(cells[1])))
        except (IndexError, ValueError):
            continue
    return found


def read_validation(folder: Path, start: int = 0) -> list[dict[str, Any]]:
    """Return the validations of a run, each with step, seconds, epoch and metrics.

    Args:
        folder: Folder of the job.
        start: Number of validations to leave out at the start.
    """
    found = []
    for line in _lines(folder / VALIDATION_FILE)[start:]:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that a run has written down; empty before its start."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts


def _lines(path: Path) -> list[str]:
    """Return the complete lines of a file that may be written to at this moment."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()


def metric_points(validation: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Return the points of each metric of validation."""
    found: dict[str, Points] = {}
    for line in validation:
        for name, value in line["metrics"].items():
            found.setdefault(name, []).append((line["step"], value, line["seconds"]))
    return found


def spikes(curve: Points) -> int:
    """Count the losses far above those before them, or not finite, each row of them once.

    A loss is a spike if it is above the median of the 48 before it by 8 times their median deviation, and by a tenth.

    Args:
        curve: Training losses.

    Example:
        >>> spikes([(i, 9.0 if i == 60 else 1.0 + i % 2 / 100, 0.0) for i in range(100)])
        1
    """
    count, before = 0, False
    window: list[float] = []
    for _, loss, _ in curve:
        high = not math.isfinite(loss)
        if not high and len(window) >= _WINDOW // 2:
            middle = median(window)
            spread = max(median(abs(value - middle) for value in window), 1e-3 * abs(middle))
            high = loss > middle + _SPIKE * spread and loss > middle + 0.1 * abs(middle)
        count += high and not before
        before = high
        if not high:
            window = [*window, loss][-_WINDOW:]
    return count
