"""The outcome of a job."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_optim.tuning.runs.job import write_json
from lightning_optim.tuning.runs.records import (
    Points,
    metric_points,
    read_curve,
    read_facts,
    read_validation,
    spikes,
)

RESULT_FILE = "result.json"

FINISHED, DIVERGED, PRUNED = "finished", "diverged", "pruned"
FAILED, OUT_OF_MEMORY, KILLED, TIMED_OUT = "failed", "out of memory", "killed", "timed out"
COMPLETE = (FINISHED, DIVERGED, PRUNED)
"""What is not run again when a study is resumed."""

_TAIL = 0.05
"""Share of the training losses whose mean is that of the end."""


@dataclass(frozen=True)
class JobResult:
    """How a job ended, and what it measured.

    Args:
        name: Name of the job.
        folder: Its folder, with ``log.txt``, ``curve.csv``, ``validation.jsonl`` and TensorBoard's event files in
            ``events``.
        status: ``"finished"``, ``"diverged"``, ``"pruned"``, ``"failed"``, ``"out of memory"``, ``"killed"`` or
            ``"timed out"``.
        error: What went wrong, in a few lines; empty if nothing did.
        steps: Number of optimizer steps.
        seconds: Seconds of training, without its first step and without validation.
        ms_per_step: Milliseconds of one optimizer step, without validation and the first steps; None if too few.
        train_loss: Mean training loss of the last twentieth of the steps; None without one.
        metrics: Last value of each metric of validation.
        state_bytes: Size of the optimizer's state, summed over optimizers; None if the fit did not end.
        skipped: Number of optimizer steps that a `DivergenceGuard` skipped.
        spikes: Number of spikes of the training loss.
        facts: What the fit has written down: digests of the initial weights and first batches, number of parameters,
            learning rates, and what the target adds.
    """

    name: str
    folder: str
    status: str
    error: str = ""
    steps: int = 0
    seconds: float = 0.0
    ms_per_step: float | None = None
    train_loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    state_bytes: int | None = None
    skipped: int = 0
    spikes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it trained to its end."""
        return self.status == FINISHED

    def curve(self) -> Points:
        """Read the training loss of each step: step, loss, seconds."""
        return read_curve(Path(self.folder))

    def validation(self) -> dict[str, Points]:
        """Read the points of each metric of validation: step, value, seconds."""
        return metric_points(read_validation(Path(self.folder)))

    def best(self, metric: str, higher: bool = False) -> tuple[int, float, float] | None:
        """Return the best point of a metric of validation: step, value, seconds; None without a finite one.

        Args:
            metric: Name of the metric.
            higher: Whether larger values are better.
        """
        known = [point for point in self.validation().get(metric, []) if math.isfinite(point[1])]
        return (max if higher else min)(known, key=lambda point: point[1]) if known else None

    def train_loss_at(self, step: int) -> float | None:
        """Return the mean training loss of the last twentieth of the steps until ``step``; None without any."""
        losses = [loss for at, loss, _ in self.curve() if at <= step and math.isfinite(loss)]
        tail = losses[-max(round(len(losses) * _TAIL), 1) :]
        return sum(tail) / len(tail) if tail else None


def summarise(name: str, folder: Path, status: str, error: str = "") -> JobResult:
    """Compute a result from what a fit has written down, however it ended.

    Args:
        name: Name of the job.
        folder: Its folder.
        status: How it ended; a finished one whose losses are not finite has diverged.
        error: What went wrong.
    """
    curve, validation, facts = read_curve(folder), read_validation(folder), read_facts(folder)
    last = {name: points[-1][1] for name, points in metric_points(validation).items()}
    tail = [loss for _, loss, _ in curve[-max(round(len(curve) * _TAIL), 1) :]]
    if status == FINISHED and (why := _divergence(tail, last, facts)):
        status, error = DIVERGED, why
    return JobResult(
        name=name,
        folder=str(folder),
        status=status,
        error=error,
        steps=curve[-1][0] if curve else int(facts.get("steps", 0)),
        seconds=curve[-1][2] if curve else 0.0,
        ms_per_step=_ms_per_step(curve),
        train_loss=sum(tail) / len(tail) if tail else None,
        metrics=last,
        state_bytes=facts.get("state_bytes"),
        skipped=int(facts.get("skipped", 0)),
        spikes=spikes(curve),
        facts=facts,
    )


def _divergence(tail: list[float], last: Mapping[str, float], facts: Mapping[str, Any]) -> str:
    from lightning_optim.diagnostics.metric_names import quantity_of, split_of

    if tail and not math.isfinite(tail[-1]):
        return "The training loss is not finite at the end."
    for name, value in last.items():
        if split_of(name) == "validation" and quantity_of(name) == "loss" and not math.isfinite(value):
            return f"{name} is not finite at the end."
    if facts.get("stopped_by_guard"):
        return "The guard has ended the run, because it diverged."
    return ""


def _ms_per_step(curve: Points) -> float | None:
    """Return the time of a step in the run's steady part: the first steps compile, allocate and fill caches."""
    skip = min(10, len(curve) // 4)
    steady = curve[skip:]
    if len(steady) < 3:
        return None
    return 1000 * (steady[-1][2] - steady[0][2]) / (len(steady) - 1)


def write_result(result: JobResult) -> None:
    """Write a result into the folder of its job, in one piece."""
    write_json(Path(result.folder) / RESULT_FILE, asdict(result))


def read_result(folder: Path) -> JobResult | None:
    """Read the result of a job; None if it has not ended."""
    try:
        content = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        return JobResult(**{**content, "folder": str(folder)})
    except (OSError, ValueError, TypeError):
        return None
