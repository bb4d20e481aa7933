"""The position of a run in its schedules, which stays continuous when the length of the run changes."""

from __future__ import annotations

import math
from typing import Any

from lightning_optim.core.durations import Horizon
from lightning_optim.schedules.base import Schedule

_SAME = 1e-12
"""Relative difference of two multipliers that counts as none: the same number, computed in two ways."""


def jumps(schedule: Schedule, horizon: Horizon, step: int, present: float) -> bool:
    """Return whether a schedule would jump, were it compiled for another length from now on.

    Args:
        schedule: The schedule.
        horizon: The other length.
        step: Steps taken.
        present: The value that the schedule has now.
    """
    try:
        new = schedule.over(horizon)(step)
    except ValueError:  # A phase has become longer than the run.
        return True
    return not math.isclose(new, present, rel_tol=_SAME, abs_tol=_SAME)


class RunClock:
    """Maps the steps taken to positions in the run for which schedules are compiled.

    As long as the length of a run is what it was at the start, the position is the step. Where the length changes and
    the present rate would jump, the schedules stay compiled for the former length, and the position advances faster or
    slower from there, such that it reaches the end of the schedules where training ends.

    Example:
        >>> clock = RunClock()
        >>> clock.restart(Horizon(total_steps=100))
        >>> clock.bend(60, total_steps=80)  # 40 positions are left, and 20 steps
        >>> [clock.at(step) for step in (60, 70, 80)]
        [60.0, 80.0, 100.0]
    """

    def __init__(self) -> None:
        self.frame: Horizon | None = None
        """The length for which schedules are compiled; None as long as none is known."""
        self._step, self._position, self._speed = 0, 0.0, 1.0

    @property
    def is_bent(self) -> bool:
        """Whether positions differ from steps."""
        return self._speed != 1.0 or self._position != self._step

    def restart(self, frame: Horizon) -> None:
        """Let positions be steps, in schedules compiled for ``frame``."""
        self.frame = frame
        self._step, self._position, self._speed = 0, 0.0, 1.0

    def at(self, step: int) -> float:
        """Return the position after ``step`` steps; an int where it is the step."""
        if not self.is_bent:
            return step
        return self._position + (step - self._step) * self._speed

    def bend(self, step: int, total_steps: int | None) -> None:
        """Keep the present position, and reach the end of the schedules after ``total_steps`` steps.

        Args:
            step: Steps taken.
            total_steps: The new length of the run. Without one, or without a former one, nothing changes.
        """
        if total_steps is None or self.frame is None or self.frame.total_steps is None:
            return
        position = float(self.at(step))
        left = max(self.frame.total_steps - position, 0.0)
        self._step, self._position = step, position
        self._speed = left / (total_steps - step) if total_steps > step else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the frame and the mapping as plain numbers."""
        frame = self.frame or Horizon()
        return {
            "total_steps": frame.total_steps,
            "steps_per_epoch": frame.steps_per_epoch,
            "epoch_ends": list(frame.epoch_ends),
            "step": self._step,
            "position": self._position,
            "speed": self._speed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.frame = Horizon(state["total_steps"], state["steps_per_epoch"], tuple(state["epoch_ends"]))
        self._step, self._position, self._speed = state["step"], state["position"], state["speed"]
