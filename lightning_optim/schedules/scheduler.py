"""The scheduler: applies schedules to an optimizer, once per optimizer step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.core.durations import Horizon
from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import typed
from lightning_optim.core.wrappers import unwrap_optimizer
from lightning_optim.schedules.base import Schedule
from lightning_optim.schedules.checks import check_value
from lightning_optim.schedules.driven import Driven
from lightning_optim.schedules.following import FollowsRun
from lightning_optim.schedules.hyperparameters import Hyperparameter
from lightning_optim.schedules.order import has_stepped, warn_of_order
from lightning_optim.schedules.resumed import check_schedules
from lightning_optim.schedules.run import scaled_phases


def _warn(message: str, warn: bool) -> None:
    if warn:
        warnings.warn(message, stacklevel=4)
    else:
        print(message)


@typed(own=("optimizer",))
class Scheduler(FollowsRun):
    """Sets each group's learning rate to its own peak times a schedule, once per optimizer step.

    The peak is the group's ``lr`` when the scheduler is made, kept as ``initial_lr`` in the group (torch's name); a
    group added later follows from then on, at the ratio that its rate has to the others' when it joins. Rates are
    always computed from the closed form, never from the previous rate, so nothing drifts over a resume. Other
    hyperparameters are driven in the same way.

    A rate that somebody else writes into a group (a callback of the user's, a finder, ``BackboneFinetuning``) is taken
    over: the group's peak becomes the one with which the schedule gives that rate now, and this is reported once.

    A group that comes with a `Schedule` as its ``schedule``, as `ParamGroupRule` makes it, follows that one; it is
    taken out of the group, because groups are saved in checkpoints.

    Args:
        optimizer: The optimizer whose groups are driven.
        schedule: The multiplier of the learning rate as a function of the step.
        horizon: Length of the run. None if it is not known yet: schedules that need no length apply at once; for others
            the optimizer keeps its rates until [`resolve`][lightning_optim.schedules.Scheduler.resolve] or
            [`follow`][lightning_optim.schedules.following.FollowsRun.follow] is called, which has to be before the
            first `step`.
        schedules: Multipliers of other hyperparameters by name: a key of the optimizer's groups, ``momentum``,
            ``beta1`` or ``beta2``.
        on_resume: Resume policy: whether checkpoint or configuration takes precedence. With ``"checkpoint"`` the run
            stays on its old curve, constant beyond its end, and another schedule is refused. With ``"config"`` this
            schedule continues from the saved position, over the length of the present run.
        tell: Reports a difference: receives the message, and whether it is a warning.
        last_epoch: How many steps have been taken, less one, where a run is continued without the scheduler's state; -1
            for none. The groups have to bring their peaks as ``initial_lr``, as those of a loaded optimizer do.

    Raises:
        KeyError: The run is continued, and a group has no ``initial_lr``.
        ValueError: A hyperparameter is unknown or would leave its range, a schedule does not fit the run, or names a
            learning rate that is not below a group's peak.

    Example:
        >>> import torch
        >>> from lightning_optim.schedules import Linear
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
        >>> scheduler = Scheduler(optimizer, Linear(warmup=2), Horizon(total_steps=10))
        >>> optimizer.param_groups[0]["lr"]
        0.2
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        horizon: Horizon | None = None,
        schedules: Mapping[str, Schedule] | None = None,
        on_resume: str = "checkpoint",
        tell: Callable[[str, bool], None] = _warn,
        last_epoch: int = -1,
    ) -> None:
        if on_resume not in ("checkpoint", "config"):
            raise ValueError(f"Unknown on_resume={on_resume!r}. {nearest(str(on_resume), ('checkpoint', 'config'))}")
        optimizer = unwrap_optimizer(optimizer)
        self._from_config = on_resume == "config"
        self._tell = tell
        self._told: set[str] = set()
        self._begin()
        self._driven = Driven(optimizer, schedule, schedules or {}, self._tell_once)
        self._has_own_length = horizon is not None
        if last_epoch != -1:
            self._driven.check_resumable(last_epoch)
        self._driven.check_peaks()
        self._restored = last_epoch != -1
        self._skipped_steps: Callable[[], int] | None = None
        self._skipped = self._skipped_before = 0
        self._order_is_known = True  # the first call of `step` comes from the constructor
        self._curves: dict[int, tuple[Schedule, Callable[[float], float]]] = {}
        self._compiled_for: Horizon | None = None
        if horizon is not None or not any(given.needs_length for given in self._driven.schedules()):
            self.horizon = horizon or Horizon()
            self._driven.check(self.horizon)
            self._clock.restart(self.horizon)
        self._is_made = False  # torch's constructor takes a first step
        super().__init__(optimizer, last_epoch)
        self._is_made = True
        self._order_is_known = self._restored
        # A loaded state brings rates of its own, which nobody has written against the schedule.
        optimizer.register_load_state_dict_post_hook(lambda _: self._driven.forget_written())

    def resolve(self, horizon: Horizon) -> None:
        """Set the length of the run, compile the schedules for it, and set the rates of the next step.

        Args:
            horizon: Length of the run.

        Raises:
            ValueError: A schedule does not fit the run, or a hyperparameter would leave its range.
        """
        self._take_over()
        horizon = self._agreed(horizon)
        self._driven.check(horizon)
        if scaled := scaled_phases(self._driven.schedules(), horizon):
            self._tell_once(
                "scaled",
                f"The run has {horizon.total_steps} optimizer steps only: the phases of {', '.join(map(repr, scaled))} "
                "are scaled to fit.",
            )
        for note in self.notes(horizon):
            self._tell_once(note, note)
        self.horizon = horizon
        self._compiled_for = None  # even for the same length: a schedule may have been changed since
        self._driven.rates.forget()
        self._apply()

    def notes(self, horizon: Horizon | None = None) -> list[str]:
        """Return sentences about parts of the schedules that have no effect in the run.

        Args:
            horizon: Length of the run; None for the present one.
        """
        run = horizon or self.horizon or Horizon()
        return [note for schedule in self._driven.schedules() for note in schedule.notes(run)]

    def hold_on(self, skipped_steps: Callable[[], int]) -> None:
        """Do not advance for steps that were skipped.

        Args:
            skipped_steps: Returns the number of optimizer steps skipped so far; called after each step.
        """
        self._skipped_steps = skipped_steps
        self._skipped = skipped_steps()
        if self.last_epoch == 0 and not self._restored:  # It begins here, behind steps of another scheduler's time.
            self._skipped_before = self._skipped

    def note_return(self) -> None:
        """Record that the run before a resume had returned to an earlier position, so that its length has changed.

        Such a length is known at the next step only, and the checkpoint may have been saved before it.
        """
        self._varies = True

    def step(self, epoch: int | None = None) -> None:
        """Advance by one step, less the steps found to have been skipped since the last call.

        Warns once if the optimizer has not stepped before the first call, and if the call is one too many, because the
        schedule moves with its optimizer by itself, as in manual optimization under Lightning.

        Args:
            epoch: Must be None; torch's schedulers have this argument.

        Raises:
            ValueError: ``epoch`` is given.
            RuntimeError: The schedule needs the length of the run, and it has not been set.
        """
        if epoch is not None:
            raise ValueError(f"Scheduler.step() counts optimizer steps and takes no epoch, got epoch={epoch}.")
        if self._is_moving_itself:
            self._tell_once(
                "own steps",
                "The schedule moves with the steps of its optimizer, so a call of its `step()` is ignored. Remove the "
                'call of `lr_schedulers().step()`; or return {"scheduler": scheduler, "interval": "step"} from '
                "configure_optimizers.",
                True,
            )
            return
        if not self._is_idle_call():
            self._advance()

    def _advance(self) -> None:
        if self.horizon is None and self._is_made:
            needing = next(given for given in self._driven.schedules() if given.needs_length)
            raise RuntimeError(
                f"{needing!r} needs the length of the run, which is not known, so the rates would stay as they are. "
                "Give OptimizerFactory.build or Scheduler a Horizon, or call scheduler.resolve(Horizon(...)) before "
                "the first step; under Lightning, put a callback of lightning_optim on the Trainer."
            )
        skipped = self._skipped if self._skipped_steps is None else self._skipped_steps()
        new, self._skipped = skipped - self._skipped, skipped
        if not self._order_is_known and new < 1:
            self._order_is_known = True
            if not has_stepped(self.optimizer):
                warn_of_order(stacklevel=3)
        if self._is_made:
            self._take_over()
        self.last_epoch += 1 - new
        self._apply()

    def observe(self, value: float) -> None:
        """Observe a new value of the metric of a `ReduceOnPlateau`, and set the rates that follow from it.

        Args:
            value: The metric, the same on all ranks.

        Raises:
            ValueError: The schedule follows no metric.
        """
        if self._driven.rates.plateau is None:
            raise ValueError(f"{self.schedule!r} looks at no metric; use ReduceOnPlateau.")
        phases = self.schedule.phases(self._clock.frame or Horizon())
        if self._clock.at(self.last_epoch) >= phases.warmup + phases.hold:
            self._take_over()
            self._driven.rates.plateau.observe(value)
            self._apply()

    @property
    def schedule(self) -> Schedule:
        """The schedule of the groups without one of their own."""
        return self._driven.rates.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self._driven.rates.schedule = schedule

    @property
    def group_schedules(self) -> dict[str, Schedule]:
        """Schedules of single groups, by the name of the group."""
        return self._driven.rates.own

    @property
    def others(self) -> dict[Hyperparameter, Schedule]:
        """Schedules of hyperparameters other than the learning rate."""
        return dict(self._driven.others)

    def get_lr(self) -> list[float | Tensor]:
        """Compute the learning rate of each group at the current step; tensors of shape [] where a group has one."""
        return self._driven.learning_rates(self._values())

    def value(self, schedule: Schedule) -> float:
        """Evaluate any schedule at the current step of this run; 1 as long as the length of the run is not known.

        Args:
            schedule: The schedule, compiled by its first evaluation.

        Raises:
            ValueError: The value is no multiplier: negative or not finite.
        """
        frame = self._clock.frame
        if frame is None:
            return 1.0
        if frame is not self._compiled_for:
            self._curves.clear()
            self._compiled_for = frame
        known, curve = self._curves.get(id(schedule), (None, None))
        if known is not schedule or curve is None:
            curve = schedule.over(frame)
            self._curves[id(schedule)] = (schedule, curve)  # kept alive with its curve, so that the id stays its own
        step = max(self.last_epoch, 0)
        found = curve(self._clock.at(step))
        check_value(found, schedule, step)
        return found

    def multipliers(self, horizon: Horizon | None = None) -> list[Callable[[float], float]]:
        """Return the schedule of each group over the whole run: a multiplier of its peak as a function of the step.

        Args:
            horizon: Length of the run; None for the scheduler's own, which it knows from its first step on.

        Raises:
            ValueError: A schedule needs the length of the run, which is not known.
        """
        horizon = horizon or self.horizon or Horizon()
        return [schedule.over(horizon) for schedule, _ in self._driven.rates.in_use(self.optimizer.param_groups)]

    def scale_peaks(self, factor: float) -> None:
        """Multiply the peak rates of all groups, as if they had been configured so.

        Args:
            factor: The factor.
        """
        self._take_over()
        self._driven.rates.scale_peaks(self.optimizer.param_groups, factor)
        self._apply()

    def _values(self) -> Callable[[Schedule], float]:
        """`value`, called once for each schedule: several groups share one, and a step evaluates all together."""
        values: dict[int, float] = {}

        def of(schedule: Schedule) -> float:
            if id(schedule) not in values:
                values[id(schedule)] = self.value(schedule)
            return values[id(schedule)]

        return of

    def _apply(self) -> None:
        self._last_lr = self._driven.apply(self._values())

    def _take_over(self) -> None:
        self._driven.take_over(self._values(), max(self.last_epoch, 0), is_placed=self.horizon is not None)

    def _tell_once(self, topic: str, message: str, warn: bool = False) -> None:
        if topic not in self._told:
            self._told.add(topic)
            self._tell(message, warn)

    # Saving and loading.

    def __getstate__(self) -> dict[str, Any]:
        # A copy compiles its schedules anew: what `over` returns cannot be pickled, and would still be the original's.
        absent = dict.fromkeys(("_compiled_for", "_run", "_pre_hook", "_post_hook", "_skipped_steps"))
        return {**vars(self), **absent, "_curves": {}}

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the length of the run and the schedules as text. Peaks are in the optimizer's groups."""
        horizon = self.horizon or Horizon()
        state: dict[str, Any] = {
            "last_epoch": self.last_epoch,
            "total_steps": horizon.total_steps,
            "steps_per_epoch": horizon.steps_per_epoch,
            "schedules": self._driven.as_text(),
        }
        if horizon.epoch_ends:
            state["epoch_ends"] = list(horizon.epoch_ends)
        if self._epochs.first is not None:
            state["epochs"] = {"first": self._epochs.first, "past": list(self._epochs.past)}
        if self._clock.is_bent:
            state["clock"] = self._clock.state_dict()
        if self._varies:
            state["varies"] = True
        if self._skipped_before:
            state["skipped_before"] = self._skipped_before
        if self._is_moving_itself and self._run is not None:
            state["run"] = self._run.state_dict()
        if self._driven.rates.plateau is not None:
            state["plateau"] = self._driven.rates.plateau.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`, and set the rates that follow from it.

        A state that is loaded while the scheduler follows a run is one of this run, as after a guard's rollback or a
        finder's trial: the schedule still ends where training ends.

        Raises:
            ValueError: The state is that of other schedules, and the checkpoint takes precedence.
        """
        check_schedules(state_dict.get("schedules", {}), self._driven.as_text(), self._from_config, self._tell)
        self.last_epoch = int(state_dict["last_epoch"])
        plateau = self._driven.rates.plateau
        if plateau is not None and "plateau" in state_dict:
            plateau.load_state_dict(state_dict["plateau"])
        began = 0 if self.last_epoch > 0 else None  # of a checkpoint of version 0.1, which has no epochs
        epochs = state_dict.get("epochs", {"first": began, "past": []})
        self._epochs.first, self._epochs.past = epochs["first"], list(epochs["past"])
        self._saved = state = dict(state_dict)
        self._varies = bool(state.get("varies"))
        self._skipped_before = int(state.get("skipped_before", 0))
        self._restored = True
        self._order_is_known |= self.last_epoch > 0
        self._driven.forget_written()
        self._mark = None
        if self._run is not None:
            self._counted = self._run.counted()
            if "run" in state:
                self._run.load_state_dict(state["run"])
        total, per_epoch = state.get("total_steps"), state.get("steps_per_epoch")
        has_length = self.horizon is not None and (self._run is None or self._has_own_length)
        if has_length and self.horizon is not None:
            self.horizon = self._agreed(self.horizon)
        elif self._from_config and self.horizon is None:
            pass  # The configuration's schedule need not fit that run; this one's length is known before the next step.
        elif total is not None:  # The rates of that run, until this one's length is known.
            self._set_clock(Horizon(total, per_epoch, tuple(state.get("epoch_ends", ()))), state)
        if self._run is not None and self.horizon is not None and not has_length:
            self._saved = None
            self.horizon = Horizon(total, per_epoch, tuple(state.get("epoch_ends", ())), self.horizon.is_trial)
        self._apply()
