"""A schedule of something else than a hyperparameter, over a run whose length may change."""

from __future__ import annotations

from collections.abc import Callable

from lightning_optim.schedules.base import Schedule
from lightning_optim.schedules.clock import RunClock, jumps
from lightning_optim.schedules.run import EpochEnds, Run


class LiveCurve:
    """The value of a schedule as a function of the optimizer steps taken; called before each step, in order.

    The length of the run is asked for again whenever it may have changed, as a `Scheduler` does.

    Args:
        schedule: The schedule.
        run: The run of the optimizer.

    Raises:
        ValueError: When it is called: the schedule does not fit the run.
    """

    def __init__(self, schedule: Schedule, run: Run) -> None:
        self._schedule, self._run = schedule, run
        self._clock, self._epochs = RunClock(), EpochEnds()
        self._mark: object = None
        self._curve: Callable[[float], float] | None = None
        self._asked_at: int | None = None

    def __call__(self, step: int) -> float:
        """Return the value for the update that follows ``step`` updates; again, if it evaluates gradients again."""
        if self._curve is not None and step == self._asked_at:
            return self._curve(self._clock.at(step))
        self._asked_at = step
        self._run.before_step()
        mark = self._run.mark()
        if self._curve is None or mark != self._mark:
            self._mark = mark
            self._curve = self._measured(step, self._curve)
        self._run.after_step()
        return self._curve(self._clock.at(step))

    def _measured(self, step: int, curve: Callable[[float], float] | None) -> Callable[[float], float]:
        horizon = self._epochs.horizon(step, self._run.ahead())
        if curve is not None and step > 0 and jumps(self._schedule, horizon, step, curve(self._clock.at(step))):
            self._clock.bend(step, horizon.total_steps)
            return curve
        self._clock.restart(horizon)
        return self._schedule.over(horizon)
