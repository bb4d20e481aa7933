"""A schedule defined by any function of the step."""

from __future__ import annotations

from collections.abc import Callable

from lightning_optim.core.durations import Duration
from lightning_optim.core.typed import typed
from lightning_optim.schedules.base import Position, Schedule
from lightning_optim.schedules.phases import Cooldown, Warmup


@typed
class FromFunction(Schedule):
    """Schedule whose multiplier is the value of a function of the step.

    Args:
        function: Function from the number of updates since warmup and hold to the multiplier of the peak.
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        hold: Length of a phase at the peak after the warmup.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.

    Raises:
        TypeError: ``function`` cannot be called.

    Example:
        >>> [FromFunction(lambda step: 0.9**step, warmup=2)(step) for step in (0, 1, 2, 3)]
        [0.5, 1.0, 1.0, 0.9]
    """

    shape_needs_total = False

    def __init__(
        self,
        function: Callable[[int], float],
        warmup: int | str | Duration | Warmup = 0,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
    ) -> None:
        super().__init__(warmup, hold, cooldown)
        if not callable(function):
            raise TypeError(
                f"Invalid function={function!r} of FromFunction: must be a function from the step to a multiplier."
            )
        self.function = function

    def shape(self, at: Position) -> float:
        """Return the value of the function."""
        return float(self.function(int(at.step)))

    def __repr__(self) -> str:
        # repr(function) contains an address, with which a resumed run would seem to have another schedule.
        function = self.function
        name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
        return f"FromFunction({name}, warmup={self.warmup!r}, hold={str(self.hold)!r}, cooldown={self.cooldown!r})"
