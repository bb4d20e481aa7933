"""What a search has found: its trials, the best of them, a table and a CSV file."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_optim.tuning.search.claims import LOST, SURPLUS

PARAMS, STATUS, ERROR, SECONDS, STEPS = "params", "status", "error", "seconds", "steps"
"""Attributes of a trial."""


@dataclass(frozen=True)
class Trial:
    """A trial of a search.

    Args:
        number: Its number in the study.
        status: ``"finished"``, ``"pruned"``, ``"diverged"``, ``"failed"``, ``"out of memory"``, ``"killed"``,
            ``"timed out"``, or ``"running"``.
        value: Best value of the metric; None unless it is finished.
        params: Its hyperparameters.
        steps: Number of optimizer steps.
        seconds: Seconds of training.
        error: What went wrong.
    """

    number: int
    status: str
    value: float | None
    params: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    error: str = ""


@dataclass(frozen=True)
class SearchResult:
    """The trials of a search.

    Args:
        folder: Folder of the search, with ``trials.csv``, the pictures, and a folder for each trial of this process.
        study: Name of the study.
        storage: Where the study is; its passwords are left out.
        metric: The metric.
        mode: ``"min"`` or ``"max"``.
        trials: All trials of the study, in order.
        pictures: Paths of the pictures.
    """

    folder: Path
    study: str
    storage: str
    metric: str
    mode: str
    trials: tuple[Trial, ...]
    pictures: tuple[Path, ...] = ()

    @property
    def ranked(self) -> list[Trial]:
        """The trials that finished, the best first."""
        done = [trial for trial in self.trials if trial.value is not None]
        return sorted(done, key=lambda trial: (trial.value or 0.0) * (1 if self.mode == "min" else -1))

    @property
    def best(self) -> Trial | None:
        """The best trial; None if none has finished."""
        return self.ranked[0] if self.ranked else None

    @property
    def paths(self) -> list[str]:
        """Paths of the hyperparameters, in the order of the space."""
        return list(dict.fromkeys(path for trial in self.trials for path in trial.params))

    def table(self, most: int = 10) -> str:
        """Return the best trials as a table, and a line about the others.

        Args:
            most: Number of trials.
        """
        rows = [["trial", self.metric, *self.paths, "steps"]]
        for trial in self.ranked[:most]:
            values = [_short(trial.params[path]) if path in trial.params else "" for path in self.paths]
            rows.append([str(trial.number), f"{trial.value:.5g}", *values, str(trial.steps or "")])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*(lines if self.ranked else []), self._counts()])

    def _counts(self) -> str:
        statuses = [trial.status for trial in self.trials]
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
        return f"{len(statuses)} trials: {counts}." if statuses else "No trial has run."

    def write_csv(self) -> Path:
        """Write all trials to ``trials.csv``; return its path."""
        path = self.folder / "trials.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["trial", "status", self.metric, *self.paths, "steps", "seconds", "error"])
            for trial in self.trials:
                values = [trial.params.get(key, "") for key in self.paths]
                cells = [json.dumps(v) if isinstance(v, list | dict) else v for v in values]
                ends = [trial.steps, trial.seconds, trial.error]
                writer.writerow([trial.number, trial.status, trial.value, *cells, *ends])
        return path


def read_trials(study: Any) -> tuple[Trial, ...]:
    """Return the trials of a study of Optuna, without those that were begun again, or one too many.

    Args:
        study: The study.
    """
    found = []
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        if trial.state.name == "WAITING" or LOST in attributes or SURPLUS in attributes:
            continue
        finished = trial.state.name == "COMPLETE" and trial.value is not None and math.isfinite(trial.value)
        status = attributes.get(STATUS) or {"RUNNING": "running", "COMPLETE": "finished"}.get(
            trial.state.name, "failed"
        )
        found.append(
            Trial(
                trial.number,
                status,
                trial.value if finished else None,
                attributes.get(PARAMS, trial.params),
                attributes.get(STEPS),
                attributes.get(SECONDS),
                attributes.get(ERROR, ""),
            )
        )
    return tuple(found)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
