"""How long steps take, and how much of that is the optimizer's, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class StepClock:
    """Seconds per step over an interval, pauses left out, and seconds of one optimizer step within it.

    The optimizer's step is timed on the device: with events on CUDA, with the host's clock elsewhere.

    Args:
        now: The host's clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._since = now()
        self._paused: float | None = None
        self._marks: list[float | torch.cuda.Event] = []

    def pause(self) -> None:
        """Stop the clock, for instance for validation."""
        self._paused = self._now()

    def resume(self) -> None:
        """Resume the clock."""
        if self._paused is not None:
            self._since += self._now() - self._paused
            self._paused = None

    def take(self) -> float:
        """Return the seconds since the last call, without pauses."""
        now, before = self._now(), self._since
        self._since = now
        return now - before

    def begin_update(self, device: torch.device) -> None:
        """Mark the begin of the optimizer's step."""
        self._marks = [self._mark(device)]

    def end_update(self, device: torch.device) -> Callable[[], float]:
        """Mark the end of the optimizer's step; return a function for its seconds, for when it is done."""
        if not self._marks:
            return lambda: float("nan")
        begin, end = self._marks.pop(), self._mark(device)
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return lambda: begin.elapsed_time(end) / 1000
        return lambda: end - begin  # type: ignore[operator]

    def _mark(self, device: torch.device) -> float | torch.cuda.Event:
        if device.type != "cuda":
            return self._now()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
