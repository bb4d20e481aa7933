"""The time of steps, and the optimizer's share of it, measured without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class StepClock:
    """Clock of the steps in an interval, without pauses, and of one optimizer step within it.

    The optimizer's step is timed by events on CUDA, which do not synchronise, and by the host's clock elsewhere.

    Args:
        now: Called for the time on the host's clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._since = now()
        self._paused: float | None = None
        self._marks: list[float | torch.cuda.Event] = []

    def pause(self) -> None:
        """Stop the clock, for instance during validation."""
        self._paused = self._now()

    def resume(self) -> None:
        """Resume the clock."""
        if self._paused is not None:
            self._since += self._now() - self._paused
            self._paused = None

    def take(self) -> float:
        """Return the seconds since the last call or the creation, without pauses."""
        now, before = self._now(), self._since
        self._since = now
        return now - before

    def begin_update(self, device: torch.device) -> None:
        """Mark the start of the optimizer's step on ``device``."""
        self._marks = [self._mark(device)]

    def end_update(self, device: torch.device) -> Callable[[], float]:
        """Mark the end of the optimizer's step on ``device``.

        Args:
            device: The device of the parameters.

        Returns:
            A function that returns the seconds of the step, to be called once the device has finished it; NaN if the
            start was not marked.
        """
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
