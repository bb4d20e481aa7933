"""The part of a scheduler that follows a run: its length, asked for live, and the steps of its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim.core.durations import Horizon
from lightning_optim.core.step_hooks import closure_of, is_trial_step
from lightning_optim.core.uncompiled import uncompiled
from lightning_optim.core.wrappers import unwrap_optimizer
from lightning_optim.schedules.base import Schedule
from lightning_optim.schedules.clock import RunClock, jumps
from lightning_optim.schedules.driven import Driven
from lightning_optim.schedules.resumed import tell_of_old_curve, tell_of_stretch
from lightning_optim.schedules.run import EpochEnds, Run


class FollowsRun(LRScheduler):
    """A scheduler that asks a run how long it is, and moves with its optimizer where nothing else moves it.

    The subclass has the schedules (`_driven`), their values (`value`) and what setting the rates takes.
    """

    _driven: Driven
    _from_config: bool
    _has_own_length: bool
    _order_is_known: bool
    _restored: bool
    _skipped: int
    _skipped_before: int
    _tell: Callable[[str, bool], None]
    optimizer: Optimizer

    def _begin(self) -> None:
        """Set everything to the beginning of a run that is not known yet."""
        self.horizon: Horizon | None = None
        self._saved: dict[str, Any] | None = None  # the lengths in a checkpoint that has been loaded
        self._varies = False  # whether the length has changed during the run
        self._clock = RunClock()
        self._epochs = EpochEnds()
        self._run: Run | None = None
        self._mark: object = None
        self._counted: int | None = None  # the host's count of steps when the schedule was moved last
        self._pre_hook: Any = None
        self._post_hook: Any = None
        self._is_pinned = self._is_moving_itself = self._steps_now = False

    # What the subclass does.

    def resolve(self, horizon: Horizon) -> None:
        """Set the length of the run."""
        raise NotImplementedError

    def value(self, schedule: Schedule) -> float:
        """Return the present value of a schedule."""
        raise NotImplementedError

    def _advance(self) -> None:
        raise NotImplementedError

    def _apply(self) -> None:
        raise NotImplementedError

    def _take_over(self) -> None:
        raise NotImplementedError

    def _tell_once(self, topic: str, message: str, warn: bool = False) -> None:
        raise NotImplementedError

    # The run.

    def follow(self, run: Run) -> None:
        """Ask ``run`` for the length from now on, before each step of the optimizer and whenever it has changed.

        Where the length changes during the run, the rate stays continuous, and the schedule ends where training ends.
        Where nothing else moves the schedule (manual optimization), it moves with the steps of its optimizer.

        Args:
            run: The run. A length that was given to the constructor stays.
        """
        if self._run is None:
            # The hooks keep the scheduler alive, should the user keep the optimizer only.
            self._pre_hook = self.optimizer.register_step_pre_hook(uncompiled(self._before_step))
        self._run, self._mark, self._counted = run, None, run.counted()
        if self.last_epoch == 0 and not (self._restored or self._has_own_length):
            self.horizon = self._clock.frame = None
            self._apply()

    def move_to(self, optimizer: Optimizer) -> None:
        """Drive another optimizer from now on, which has come in the place of this one in mid-run.

        Its rates are those of the present step, as a group's that is added later are; groups that bring their peaks
        as ``initial_lr`` keep them.

        Args:
            optimizer: The other optimizer.

        Raises:
            ValueError: It does not have a hyperparameter that is scheduled.
        """
        self._driven.move_to(unwrap_optimizer(optimizer))
        for hook in (self._pre_hook, self._post_hook):
            if hook is not None:
                hook.remove()
        self.optimizer = unwrap_optimizer(optimizer)
        self._post_hook, self._order_is_known, self._steps_now = None, True, False
        if self._run is not None:
            self._run.move_to(self.optimizer)
            self._pre_hook = self.optimizer.register_step_pre_hook(uncompiled(self._before_step))
        self.optimizer.register_load_state_dict_post_hook(lambda _: self._driven.forget_written())
        self._apply()
        rates = ", ".join(f"{float(rate):.4g}" for rate in self.get_last_lr())
        self._tell(
            f"{type(self.optimizer).__name__} has come in the place of another optimizer: "
            f"{self._driven.rates.schedule!r} drives it from step {max(self.last_epoch, 0)} on, from its present "
            f"learning rate of {rates}.",
            False,
        )

    @property
    def has_own_length(self) -> bool:
        """Whether the constructor was given the length of the run."""
        return self._has_own_length

    @property
    def is_following(self) -> bool:
        """Whether it asks a run for its length."""
        return self._run is not None

    def refresh(self) -> None:
        """Ask the run for its length, if that has changed.

        Raises:
            ValueError: A schedule does not fit the run.
        """
        run = self._run
        mover = None if run is None else run.moved_by(self)
        self._is_moving_itself = mover == "optimizer"
        if run is None or mover is None:
            return
        mark = run.mark()
        if not self._has_own_length and (mark != self._mark or self.horizon is None):
            self._mark = mark
            self._measure(run)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        if self._run is None or is_trial_step(optimizer, closure_of(args, kwargs)):
            return
        self._run.before_step()
        self.refresh()
        if self._is_moving_itself and self._post_hook is None:
            # Registered now, so that it comes after those that restore what they have changed for the step.
            self._post_hook = optimizer.register_step_post_hook(uncompiled(self._after_step))
        self._steps_now = self._is_moving_itself

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # torch calls hooks anew for a `super().step()` within a step; that is one step.
        if self._steps_now and self._run is not None:
            self._steps_now = False
            self._run.after_step()
            self._advance()

    def _is_idle_call(self) -> bool:
        """Whether no step was taken since the last call: Lightning calls `step` for a batch that is left out, too."""
        count = None if self._run is None else self._run.counted()
        before, self._counted = self._counted, count
        return count is not None and count == before

    # Its length.

    def _measure(self, run: Run) -> None:
        """Take in the length that the run has now."""
        skipped = self._skipped - self._skipped_before
        taken = self.last_epoch + skipped
        horizon = self._epochs.horizon(taken, run.ahead())
        before = self.horizon
        if before is None or self._saved is not None or taken == 0:
            self.resolve(horizon)
            return
        if self._is_pinned or _lengths(horizon) == _lengths(before):
            return
        self._take_over()
        self.horizon = horizon
        step = max(self.last_epoch, 0)
        if any(jumps(schedule, horizon, step, self.value(schedule)) for schedule in self._driven.in_use()):
            total = horizon.total_steps
            self._clock.bend(self.last_epoch, None if total is None else total - skipped)
        else:
            self._clock.restart(horizon)
        self._apply()
        if horizon.is_trial and not before.is_trial:
            return  # a finder's, in the middle of the run: what it changes is restored
        if horizon.total_steps is None:
            if before.total_steps is not None:
                self._tell_once(
                    "no length",
                    f"Nothing bounds the run now, which was to be {before.total_steps} optimizer steps long: the "
                    "schedule goes on as it was, and is constant beyond that.",
                )
        elif before.total_steps != horizon.total_steps and any(each.needs_length for each in self._driven.schedules()):
            self._varies = True
            former = "which was not known" if before.total_steps is None else f"not {before.total_steps}"
            self._tell_once(
                "length",
                f"The run is {horizon.total_steps} optimizer steps long now, {former}: from its present value on, the "
                "schedule is stretched to end where training ends.",
            )

    def _agreed(self, present: Horizon) -> Horizon:
        """The length that applies, for which the clock is set: that of this run, or the one in the checkpoint."""
        saved, self._saved = self._saved, None
        total = None if saved is None else saved.get("total_steps")
        of_no_length = not any(given.needs_length for given in self._driven.schedules())
        if saved is None or total in (None, present.total_steps) or of_no_length:
            self._set_clock(present, saved)
            return present
        former = Horizon(total, saved["steps_per_epoch"], tuple(saved.get("epoch_ends", ())))
        if not self._from_config and self._varies and self._run is not None:
            self._mark = None  # The length had varied before the checkpoint: it is followed as it would have been.
            self._set_clock(former, saved)
            return former
        if self._from_config:
            tell_of_stretch(total, present.total_steps, self._tell)
            self._is_pinned = False
            self._set_clock(present, None)
            return present
        last = next(self._driven.in_use()).over(former)(total)
        tell_of_old_curve(total, present.total_steps, self.last_epoch, last, self._tell)
        self._is_pinned = True
        self._set_clock(former, saved)
        return former

    def _set_clock(self, frame: Horizon, saved: Mapping[str, Any] | None) -> None:
        if saved is not None and "clock" in saved:
            self._clock.load_state_dict(saved["clock"])
        else:
            self._clock.restart(frame)


def _lengths(horizon: Horizon) -> tuple[Any, ...]:
    return horizon.total_steps, horizon.steps_per_epoch, horizon.epoch_ends
