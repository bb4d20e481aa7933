"""Runs for schedulers to follow, without a Trainer."""

from __future__ import annotations

from lightning_optim.core.durations import Horizon
from lightning_optim.schedules.run import Ahead


class LoopRun:
    """A loop of epochs, whose lengths may be changed while it runs.

    Args:
        epochs: Optimizer steps of each epoch.
        mover: Who moves the scheduler.
    """

    def __init__(self, *epochs: int, mover: str | None = "caller") -> None:
        self.epochs, self.mover, self.taken = list(epochs), mover, 0
        self.asked = 0

    def moved_by(self, scheduler):
        return self.mover

    def mark(self):
        return tuple(self.epochs), self._epoch()

    def ahead(self):
        self.asked += 1
        epoch = self._epoch()
        began = sum(self.epochs[:epoch])
        return Ahead(sum(self.epochs) - self.taken, epoch, self.taken - began, tuple(self.epochs[epoch:]))

    def counted(self):
        return None

    def before_step(self):
        pass

    def after_step(self):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def _epoch(self):
        return sum(sum(self.epochs[: i + 1]) <= self.taken for i in range(len(self.epochs) - 1))


def standing(horizon: Horizon) -> LoopRun:
    """A run of this length, which does not change."""
    length = int(horizon.steps_per_epoch or horizon.total_steps)
    return LoopRun(*[length] * (horizon.total_steps // length))
