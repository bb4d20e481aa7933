"""Responses of `DivergenceGuard` to what skipping does not fix, and taking them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning.pytorch as L

from lightning_optim.callbacks._guard.guarded import GuardedOptimizer
from lightning_optim.callbacks._guard.reporter import GuardReporter
from lightning_optim.callbacks._guard.snapshots import RunSnapshots
from lightning_optim.callbacks._guard.step_batches import StepLocation
from lightning_optim.callbacks._lightning import logging_step, minimum_left
from lightning_optim.core.stateful import Stateful
from lightning_optim.divergence import Alarm, Ladder

_OF_THE_LOSS = ("jump", "slow_divergence")
"""Alarms that turn out to be false if the data is the cause."""
_OF_THE_WEIGHTS = (*_OF_THE_LOSS, "collapsed")
"""Alarms that say that the run is unstable, unlike a row of bad batches."""
_UNDONE_WITHIN = 200
"""Number of steps after a response in which a level of the data explains the alarm that led to it."""


class Responses(Stateful):
    """Responses of one fit.

    Args:
        ladder: The choice among them.
        reporter: Where they are reported.
        guarded: Called to get the guard's parts of each optimizer.
        snapshots: Called to get the snapshots; None if there are none.
    """

    STATE = ("before", "at")

    def __init__(
        self,
        ladder: Ladder,
        reporter: GuardReporter,
        guarded: Callable[[], Sequence[GuardedOptimizer]],
        snapshots: Callable[[], RunSnapshots | None],
    ) -> None:
        self._ladder, self._reporter = ladder, reporter
        self._guarded, self._snapshots = guarded, snapshots
        self._is_ending = False
        self._before: list[float] = []
        """Permanent factors on the learning rates before the last response, if it was one to the loss."""
        self._at = 0
        """Step of that response on the loggers' axis."""

    def respond(self, trainer: L.Trainer, alarm: Alarm, location: StepLocation) -> str | None:
        """Take the rung of the ladder that is due.

        Args:
            trainer: The Trainer.
            alarm: What asks for a response.
            location: Where its step took place.

        Returns:
            The rung that was taken; None for none.
        """
        snapshots = self._snapshots()
        back_to = None if snapshots is None else snapshots.back_to
        step, factors = logging_step(trainer), [guarded.cut.lasting for guarded in self._guarded()]
        rung = self._ladder.act(step, can_roll_back=back_to is not None, lost=alarm.lost)
        text: str | None = None
        if rung == "rollback":
            if (lower := self._roll_back()) is None:
                self._ladder.undo()
                rung = self._ladder.act(step, can_roll_back=False, lost=alarm.lost)
            else:
                text = f"back to the state after step {back_to}, continuing with the next batches{lower}"
        if rung == "lr_cut":
            text = self._cut_lr()
        elif rung == "stop":
            text = self._end(trainer)
        if text is not None:
            self._reporter.notify_response(trainer, alarm, location, text)
        if rung in ("lr_cut", "rollback"):
            for guarded in self._guarded() if alarm.kind in _OF_THE_WEIGHTS else ():
                guarded.judge.responded()
                guarded.watch.rates.distrust()
            self._before, self._at = (factors, step) if alarm.kind in _OF_THE_LOSS else ([], step)
        return rung

    def undo(self, trainer: L.Trainer, alarm: Alarm, location: StepLocation) -> None:
        """Return the learning rate to what it was before the last response, if that was one to the loss, and recent.

        Args:
            trainer: The Trainer.
            alarm: What shows that the data was the cause.
            location: Where its step took place.
        """
        before, self._before = self._before, []
        if not before or logging_step(trainer) - self._at > _UNDONE_WITHIN:
            return
        changed = [guarded.cut.factor for guarded in self._guarded()] != before
        for guarded, factor in zip(self._guarded(), before, strict=False):
            guarded.cut.undo(factor)
            guarded.judge.responded(stands=False)
        self._ladder.undo()
        if changed:
            text = "the learning rate is what it was before, because the data was the cause"
            self._reporter.notify_response(trainer, alarm, location, text)

    def _end(self, trainer: L.Trainer) -> str | None:
        """End the run, as soon as the Trainer's minimum allows it; None if that has been reported."""
        trainer.should_stop = True
        if self._is_ending:
            return None
        self._is_ending = True
        minimum = minimum_left(trainer)
        no_way_back = self._ladder.rollback is not None and self._snapshots() is None
        without = "; there is no snapshot to return to" if no_way_back else ""
        once = "" if minimum is None else f" as soon as the Trainer's minimum ({minimum}) is reached, not before"
        used = self._ladder.why_stop()
        return f"training is stopped{once}, because all other responses are used up ({used}{without})"

    def _cut_lr(self) -> str:
        cut = self._ladder.lr_cut
        assert cut is not None
        for guarded in self._guarded():
            guarded.cut.start(cut.factor, cut.steps, cut.recover)
        return f"learning rate times {cut.factor:g} for {cut.steps} steps"

    def _roll_back(self) -> str | None:
        """Return to the last snapshot; None if it could not be read."""
        snapshots, rollback = self._snapshots(), self._ladder.rollback
        assert snapshots is not None
        assert rollback is not None
        times = snapshots.restore()
        if times is None:
            return None
        factor = rollback.lr_factor**times
        if factor == 1:
            return ""
        for guarded in self._guarded():
            guarded.cut.lower(factor)
        return f", learning rate times {factor:g}"
