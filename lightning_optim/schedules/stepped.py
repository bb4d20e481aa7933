"""Piecewise constant schedules: step decay and multi-step decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_optim.core.durations import Duration, Horizon
from lightning_optim.core.typed import typed
from lightning_optim.schedules.base import Phases, Position, Schedule
from lightning_optim.schedules.phases import Cooldown, Warmup


@typed
class StepDecay(Schedule):
    """Multiplication by ``factor`` at equal intervals, counted from the end of warmup and hold.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        every: Length of each level, such as ``"30 epochs"``; the length of the run is needed only for a share of it.
        factor: Multiplier from one level to the next, above 0.
        hold: Length of a phase at the peak before the first level.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.

    Raises:
        ValueError: ``every`` is 0, or ``factor`` is not a finite number above 0.

    Example:
        >>> [StepDecay(every=30, factor=0.5)(step) for step in (0, 29, 30, 60)]
        [1.0, 1.0, 0.5, 0.25]
    """

    shape_needs_total = False

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = 0,
        every: int | str | Duration = "30%",
        factor: float = 0.1,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
    ) -> None:
        super().__init__(warmup, hold, cooldown)
        self.every = Duration.parse(every)
        if not self.every:
            raise ValueError(f"Invalid every={every!r} of StepDecay: must be above 0, for instance '30 epochs'.")
        self.factor = _checked_factor(self, factor)

    def shape(self, at: Position) -> float:
        """factor^⌊step / every⌋."""
        if self.every.unit == "epochs" and at.run.epoch_ends:
            began, now = at.run.epochs_at(at.start), at.run.epochs_at(at.start + at.step)
            assert began is not None
            assert now is not None
            return float(self.factor ** math.floor((now - began) / self.every.amount + 1e-9))
        return float(self.factor ** (at.step // self.every.steps(at.run)))


@typed(own=("milestones",))
class MultiStepDecay(Schedule):
    """Multiplication by ``factor`` at each of the ``milestones``, which count from the beginning of the run.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        milestones: Times of the reductions, such as ``["30 epochs", "60 epochs"]``. The update that follows as many
            updates is the first one at the new level.
        factor: Multiplier from one level to the next, above 0.
        hold: Length of a phase at the peak after the warmup, in which milestones have no effect.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.

    Raises:
        ValueError: There is no milestone, or ``factor`` is not a finite number above 0.

    Example:
        >>> [MultiStepDecay(milestones=[50, 75], factor=0.5)(step) for step in (49, 50, 75)]
        [1.0, 0.5, 0.25]
    """

    shape_needs_total = False

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = 0,
        milestones: Sequence[int | str | Duration] = ("50%", "75%"),
        factor: float = 0.1,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
    ) -> None:
        super().__init__(warmup, hold, cooldown)
        if not isinstance(milestones, list | tuple) or not milestones:
            raise ValueError(
                f"Invalid milestones={milestones!r} of MultiStepDecay: must be a list, for instance ['50%', '75%']."
            )
        self.milestones = [Duration.parse(milestone) for milestone in milestones]
        self.factor = _checked_factor(self, factor)

    def phases(self, run: Horizon) -> Phases:
        """Convert the lengths of the parts into optimizer steps, as `Schedule.phases` does.

        Raises:
            ValueError: As there, or all milestones lie beyond the end of the run.
        """
        beyond = self._beyond(run)
        if len(beyond) == len(self.milestones) and not run.is_trial:
            raise ValueError(
                f"{self}: no milestone lies within the run of {run.total_steps} optimizer steps, so the rate would "
                "never fall. Give earlier ones, or the schedule 'constant'."
            )
        return super().phases(run)

    def notes(self, run: Horizon) -> list[str]:
        """Name the milestones beyond the end of the run."""
        named = ", ".join(f"'{milestone}'" for milestone in self._beyond(run))
        return [f"{self}: beyond the run of {run.total_steps} optimizer steps: {named}."] if named else []

    def _beyond(self, run: Horizon) -> list[Duration]:
        total = run.total_steps
        return [] if total is None else [each for each in self.milestones if each.steps(run) >= total]

    def shape(self, at: Position) -> float:
        """factor^(number of milestones passed)."""
        step = at.start + at.step
        return float(self.factor ** sum(milestone.steps(at.run) <= step for milestone in self.milestones))


Step = StepDecay
"""Former name of `StepDecay`; configurations use it."""
MultiStep = MultiStepDecay
"""Former name of `MultiStepDecay`; configurations use it."""


def _checked_factor(owner: Any, factor: float) -> float:
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"Invalid factor={factor!r} of {type(owner).__name__}: must be finite and above 0.")
    return float(factor)
