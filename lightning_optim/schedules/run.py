"""The run that a scheduler follows: what it must be able to ask, at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_optim.core.durations import Horizon


@dataclass(frozen=True)
class Ahead:
    """What a run still has before it, seen by one optimizer.

    Args:
        steps: Optimizer steps to come, the next one included; None if nothing bounds them.
        epoch: Number of the present epoch, from 0.
        taken_in_epoch: Steps taken in the present epoch.
        epochs: Length in steps of the present epoch and of each further one; empty if not known.
        is_trial: Whether the run is shorter than the one that is configured.
    """

    steps: int | None
    epoch: int = 0
    taken_in_epoch: int = 0
    epochs: tuple[int, ...] = ()
    is_trial: bool = False


class Run(Protocol):
    """The source of the length of a run. `lightning_optim.factory.run_length.RunLength` is that of a Trainer."""

    def moved_by(self, scheduler: Any) -> str | None:
        """Return who moves the scheduler after a step.

        ``"caller"`` if its `step` is called, ``"optimizer"`` if it has to move with its optimizer's own steps, and None
        if the rates are somebody else's at present, as in the trial of a finder.
        """
        ...

    def move_to(self, optimizer: Any) -> None:
        """Go on with another optimizer, which has come in the place of this one."""
        ...

    def mark(self) -> object:
        """Return what the answer of `ahead` depends on apart from the position: equal marks, equal lengths. Cheap."""
        ...

    def ahead(self) -> Ahead:
        """Return what is to come, from the next optimizer step on."""
        ...

    def counted(self) -> int | None:
        """Return the number of steps that the host has counted; None if it counts none."""
        ...

    def before_step(self) -> None:
        """Record that the optimizer is about to step."""
        ...

    def after_step(self) -> None:
        """Record that it has stepped."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what the run has learned about its optimizer, as plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        ...


class EpochEnds:
    """The steps by which epochs have ended, and those by which further ones will."""

    def __init__(self) -> None:
        self.first: int | None = None
        """Number of the epoch in which the scheduler began."""
        self.past: list[int] = []

    def horizon(self, taken: int, ahead: Ahead) -> Horizon:
        """Return the length of the whole run.

        Args:
            taken: Steps taken so far.
            ahead: What is to come.
        """
        if self.first is None:
            self.first = ahead.epoch
        began = taken - ahead.taken_in_epoch
        passed = ahead.epoch - self.first
        while len(self.past) < passed:  # Resumed without them, or an epoch without a step: as long as each other.
            known = self.past[-1] if self.past else 0
            self.past.append(known + round((began - known) / (passed - len(self.past))))
        ends = list(self.past[:passed])
        for steps in ahead.epochs:
            began += steps
            ends.append(began)
        total = None if ahead.steps is None else taken + ahead.steps
        lengths = [end - before for end, before in zip(ends, [0, *ends], strict=False)]
        uniform = len(set(lengths)) <= 1
        mean = ends[-1] / len(ends) if ends and ahead.epochs else None
        return Horizon(total, mean, () if uniform or not ahead.epochs else tuple(ends), ahead.is_trial)


def scaled_phases(schedules: Sequence[Any], horizon: Horizon) -> list[Any]:
    """Return the schedules that have to be scaled to fit into a trial run."""
    if not horizon.is_trial:
        return []
    whole = Horizon(horizon.total_steps, horizon.steps_per_epoch, horizon.epoch_ends)
    return [schedule for schedule in schedules if not _fits(schedule, whole)]


def _fits(schedule: Any, horizon: Horizon) -> bool:
    try:
        schedule.phases(horizon)
    except ValueError:
        return False
    return True
