"""The callbacks that trials do without."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from lightning_optim.callbacks._packages import is_lightning
from lightning_optim.core.suggest import nearest

SHOWING = (
    *("Checkpoint", "EarlyStopping", "ProgressBar", "LearningRateMonitor", "DeviceStatsMonitor", "Timer"),
    *(
        "ModelSummary",
        "LearningRateFinder",
        "BatchSizeFinder",
        "OnExceptionCheckpoint",
        "ThroughputMonitor",
        "SaveConfigCallback",
    ),
)
"""Lightning's callbacks that show, save or end a run, and change nothing in a step."""


def is_showing(callback: Any) -> bool:
    """Return whether a callback shows, saves or ends a run, or looks for rates itself: trials do without it.

    Args:
        callback: A callback of Lightning, of ours or of the user's.
    """
    if getattr(type(callback), "finds_rates", False):
        return True
    return any(is_lightning(callback, name) for name in SHOWING)


def class_names(callback: Any) -> set[str]:
    """Return the names of a callback's class and its bases."""
    return {cls.__name__ for cls in type(callback).__mro__}


def check_names(without: Collection[str], callbacks: Iterable[Any]) -> None:
    """Check that there are callbacks of these names to leave out.

    Args:
        without: Names of classes.
        callbacks: All callbacks.

    Raises:
        ValueError: None of the callbacks is of a class of that name.
    """
    found = {name: type(each).__name__ for each in callbacks for name in class_names(each)}
    for name in without:
        if name not in found:
            options = {each for each in found.values() if each != "Hub"}
            raise ValueError(f"Invalid without={name!r}: no callback has such a class. {nearest(name, options)}")
