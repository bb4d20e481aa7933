"""A progress bar over jobs."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_optim.tuning.runs.job import Job
from lightning_optim.tuning.runs.records import CURVE_FILE
from lightning_optim.tuning.runs.result import FINISHED, JobResult

_EVERY = 0.5


class Progress:
    """Show how many jobs have ended and which of them run, with rich; without rich, a line for each that ends.

    Args:
        title: What the jobs are.
        total: Number of jobs; None if it is not known.
        on: Whether to show anything.
    """

    def __init__(self, title: str, total: int | None, on: bool = True) -> None:
        self._title, self._total, self._on = title, total, on
        self._done = 0
        self._shown = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        """Open the bar."""
        if not self._on:
            return self
        with contextlib.suppress(ModuleNotFoundError):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            if console.is_terminal:
                columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
                self._bar = Bar(*columns, TextColumn("[dim]{task.fields[now]}"), console=console)
                self._bar.start()
                self._task = self._bar.add_task(self._title, total=self._total, now="")
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.update(self._task, now="")
            self._bar.stop()

    def show(self, running: Sequence[tuple[Job, Path]]) -> None:
        """Show the jobs that run, with the last step of each."""
        if self._bar is None or time.monotonic() - self._shown < _EVERY:
            return
        self._shown = time.monotonic()
        parts = []
        for job, folder in running[:4]:
            step = last_step(folder)
            share = f" {step / job.steps:.0%}" if job.steps and step else f" {step}" if step else ""
            parts.append(f"{job.name}{share}")
        self._bar.update(self._task, now=", ".join(parts) + (" ..." if len(running) > 4 else ""))

    def end(self, result: JobResult) -> None:
        """Count a job that has ended, and say so where it went wrong."""
        self._done += 1
        if not self._on:
            return
        text = f"{result.name}: {result.status}"
        text += f" ({result.error.splitlines()[0]})" if result.error else ""
        if self._bar is not None:
            self._bar.advance(self._task)
            if result.status != FINISHED:
                self._bar.console.print(text, markup=False, highlight=False)
        else:
            total = "" if self._total is None else f"/{self._total}"
            print(f"{self._title} {self._done}{total}  {text}", file=sys.stderr, flush=True)


def last_step(folder: Path) -> int:
    """Return the last step that a job has written; 0 before the first one."""
    try:
        with (folder / CURVE_FILE).open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 200, 0))
            lines = file.read().split(b"\n")
            return int(lines[-2].split(b",")[0])
    except (OSError, ValueError, IndexError):
        return 0
