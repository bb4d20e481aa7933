"""The scheduler: applies schedules to an optimizer, once per optimizer step."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim.core.durations import Horizon
from lightning_optim.core.suggest import nearest
from lightning_optim.core.wrappers import unwrap_optimizer
from lightning_optim.schedules.base import Schedule
from lightning_optim.schedules.hyperparameters import LR, Hyperparameter, hyperparameter
from lightning_optim.schedules.order import has_stepped, warn_of_order
from lightning_optim.schedules.plateau import Plateau, ReduceOnPlateau

_FORMER_NAMES = re.compile(r"^(Multi)?Step\(")
"""Schedules in checkpoints that were saved before `StepDecay` and `MultiStepDecay` had these names."""

_SAMPLES = 101
"""Number of steps of the run at which the values of a hyperparameter are checked beforehand."""


def _warn(message: str, warn: bool) -> None:
    if warn:
        warnings.warn(message, stacklevel=4)
    else:
        print(message)


class Scheduler(LRScheduler):
    """Sets each group's learning rate to its own peak times a schedule, once per optimizer step.

    The peak is the group's ``lr`` when the scheduler is made, kept as ``initial_lr`` in the group (torch's name); a
    group added later follows from then on, at the ratio that its rate has to the others' when it joins. Rates are
    always computed from the closed form, never from the previous rate, so nothing drifts over a resume. Other
    hyperparameters are driven in the same way.

    A group that comes with a `Schedule` as its ``schedule``, as `ParamGroupRule` makes it, follows that one; it is
    taken out of the group, because groups are saved in checkpoints.

    Args:
        optimizer: The optimizer whose groups are driven.
        schedule: The multiplier of the learning rate as a function of the step.
        horizon: Length of the run. None if it is not known yet: the optimizer keeps its rates until
            [`resolve`][lightning_optim.schedules.Scheduler.resolve] is called, which has to be before the first step.
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
        self._saved_horizon: Horizon | None = None
        self.schedule = schedule
        self.group_schedules: dict[str, Schedule] = {}
        self._take_schedules(optimizer)
        owner = type(optimizer).__name__
        self._others: dict[Hyperparameter, Schedule] = {
            hyperparameter(name, optimizer.defaults, owner): given for name, given in (schedules or {}).items()
        }
        self._plateau = Plateau(schedule) if isinstance(schedule, ReduceOnPlateau) else None
        self.horizon = horizon
        self.asks_for_horizon = horizon is None
        if last_epoch != -1:
            self._check_resumable(optimizer, last_epoch)
        self._check_rates(optimizer)
        self._restored = last_epoch != -1
        self._skipped_steps: Callable[[], int] | None = None
        self._skips_seen = 0
        self._order_is_known = True  # the first call of `step` comes from the constructor
        self._peaks: dict[int, tuple[Tensor, float]] = {}
        self._at_peak: dict[tuple[int, float], tuple[Schedule, Schedule]] = {}
        self._curves: dict[int, tuple[Schedule, Callable[[int], float]]] = {}
        self._compiled_for: Horizon | None = None
        self._applied = 0.0  # the multiplier of the rates as they are; 0 before there are any
        if horizon is not None:
            self._check(horizon, optimizer)
        super().__init__(optimizer, last_epoch)
        self._order_is_known = self._restored

    def resolve(self, horizon: Horizon) -> None:
        """Set the length of the run, compile the schedules for it, and set the rates of the next step.

        Args:
            horizon: Length of the run.

        Raises:
            ValueError: A schedule does not fit the run, or a hyperparameter would leave its range.
        """
        self.horizon = self._agreed(horizon)
        self._check(self.horizon, self.optimizer)
        self._compiled_for = None  # even for the same length: a schedule may have been changed since
        self._at_peak.clear()
        self._apply()

    def hold_on(self, skipped_steps: Callable[[], int]) -> None:
        """Do not advance for steps that were skipped.

        Args:
            skipped_steps: Returns the number of optimizer steps skipped so far; called after each step.
        """
        self._skipped_steps = skipped_steps
        self._skips_seen = skipped_steps()

    def step(self, epoch: int | None = None) -> None:
        """Advance by one step, less the steps found to have been skipped since the last call.

        Warns once if the optimizer has not stepped before the first call.

        Args:
            epoch: Must be None; torch's schedulers have this argument.

        Raises:
            ValueError: ``epoch`` is given.
        """
        if epoch is not None:
            raise ValueError(f"Scheduler.step() counts optimizer steps and takes no epoch, got epoch={epoch}.")
        skipped = self._skips_seen if self._skipped_steps is None else self._skipped_steps()
        moved = 1 - (skipped - self._skips_seen)
        self._skips_seen = skipped
        if not self._order_is_known and moved > 0:
            self._order_is_known = True
            if not has_stepped(self.optimizer):
                warn_of_order(stacklevel=2)
        self.last_epoch += moved
        self._apply()

    def observe(self, value: float) -> None:
        """Observe a new value of the metric of a `ReduceOnPlateau`, and set the rates that follow from it.

        Args:
            value: The metric, the same on all ranks.

        Raises:
            ValueError: The schedule follows no metric.
        """
        if self._plateau is None:
            raise ValueError(f"{self.schedule!r} looks at no metric; use ReduceOnPlateau.")
        phases = self.schedule.phases(self.horizon or Horizon())
        if self.last_epoch >= phases.warmup + phases.hold:
            self._plateau.observe(value)
            self._apply()

    @property
    def others(self) -> dict[Hyperparameter, Schedule]:
        """Schedules of hyperparameters other than the learning rate."""
        return dict(self._others)

    @property
    def is_fresh(self) -> bool:
        """Whether it is at its start and no checkpoint has been loaded."""
        return self.last_epoch == 0 and not self._restored

    def get_lr(self) -> list[float | Tensor]:
        """Compute the learning rate of each group at the current step; tensors of shape [] where a group has one."""
        return self._rates(_once(self.value))

    def value(self, schedule: Schedule) -> float:
        """Evaluate any schedule at the current step of this run; 1 as long as the length of the run is not known.

        Args:
            schedule: The schedule, compiled by its first evaluation.
        """
        horizon = self.horizon
        if horizon is None:
            return 1.0
        if horizon is not self._compiled_for:
            self._curves.clear()
            self._compiled_for = horizon
        known, curve = self._curves.get(id(schedule), (None, None))
        if known is not schedule or curve is None:
            curve = schedule.over(horizon)
            self._curves[id(schedule)] = (schedule, curve)  # kept alive with its curve, so that the id stays its own
        return curve(max(self.last_epoch, 0))

    def _rates(self, value: Callable[[Schedule], float]) -> list[float | Tensor]:
        groups = self.optimizer.param_groups
        if any("schedule" in group or "initial_lr" not in group for group in groups):
            self._take_in_new_groups()
        shared = self.schedule
        reduced = self._plateau is not None and self._plateau.reductions > 0
        if not (self.group_schedules or reduced or shared.is_absolute):  # nearly always, and the quicker way
            multiplier = value(shared)
            return [group["initial_lr"] * multiplier for group in groups]
        return [self._rate(index, group, value) for index, group in enumerate(groups)]

    def _rate(self, index: int, group: dict[str, Any], value: Callable[[Schedule], float]) -> float | Tensor:
        own = self.group_schedules.get(group.get("name", ""))
        base = LR.base(group)
        multiplier = value(self._for_peak(self.schedule if own is None else own, base))
        if own is not None or self._plateau is None or not self._plateau.reductions:
            return base * multiplier
        lowest = self._plateau.schedule.min_lr_of(index, group.get("name"))
        return self._plateau.rate(self._peak(base), lowest) * multiplier

    def _multiplier(self, value: Callable[[Schedule], float]) -> float:
        """The present multiplier of the peaks; where the schedule names learning rates, that of the first group."""
        schedule = self._for_peak(self.schedule, LR.base(self.optimizer.param_groups[0]))
        return value(schedule) * (self._plateau.level if self._plateau is not None else 1.0)

    def _peak(self, base: float | Tensor) -> float:
        """``base`` on the host; a tensor is read once only."""
        if not isinstance(base, Tensor):
            return base
        if self._peaks.get(id(base), (None,))[0] is not base:
            self._peaks[id(base)] = (base, float(base))
        return self._peaks[id(base)][1]

    def _for_peak(self, schedule: Schedule, base: float | Tensor) -> Schedule:
        """The schedule as multipliers of this peak; one object for each schedule and peak."""
        if not schedule.is_absolute:
            return schedule
        key = (id(schedule), self._peak(base))
        known, at_peak = self._at_peak.get(key, (None, schedule))
        if known is not schedule:
            at_peak = schedule.for_peak(key[1])
            self._at_peak[key] = (schedule, at_peak)
        return at_peak

    def _take_schedules(self, optimizer: Optimizer) -> None:
        for index, group in enumerate(optimizer.param_groups):
            if isinstance(own := group.get("schedule"), Schedule):
                del group["schedule"]
                self.group_schedules[group.setdefault("name", str(index))] = own

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        value = _once(self.value)
        for group, lr in zip(groups, self._rates(value), strict=True):
            LR.write(group, lr)
        self._applied = self._multiplier(value)
        for other, schedule in self._others.items():
            multiplier = value(schedule)
            for group in groups:
                other.write(group, other.base(group) * multiplier)
        # Copies, as torch promises of get_last_lr: a rate that is a tensor changes in place.
        self._last_lr = [LR.read(group) for group in groups]

    def _take_in_new_groups(self) -> None:
        self._take_schedules(self.optimizer)
        for group in self.optimizer.param_groups:
            if self._applied and "initial_lr" not in group:
                self._join(group, self._applied)
            LR.base(group)

    def _join(self, group: dict[str, Any], multiplier: float) -> None:
        """Set the peak of a group that was added during the run: its rate is that of the present step."""
        group["initial_lr"] = group["lr"] / multiplier
        if group.get("peak_lr_from", "given") != "given":  # of our optimizers, for weight decay that refers to it
            group["peak_lr"] = float(group["initial_lr"])

    def _check_resumable(self, optimizer: Optimizer, last_epoch: int) -> None:
        if isinstance(last_epoch, bool) or not isinstance(last_epoch, int) or last_epoch < -1:
            raise ValueError(f"Invalid last_epoch={last_epoch!r}: it is a whole number of steps, or -1 for none.")
        if self._plateau is not None:
            raise ValueError(
                f"last_epoch={last_epoch} does not say how often {self.schedule!r} has reduced the rates. Save its "
                "state_dict(), and load it."
            )
        for driven in (LR, *self._others):
            for index, group in enumerate(optimizer.param_groups):
                if driven.base_key not in group:
                    raise KeyError(
                        f"param '{driven.base_key}' is not specified in param_groups[{index}] when resuming with "
                        f"last_epoch={last_epoch}: it is the value at the peak, which the present one is not. Load the "
                        "optimizer's state first, or give the groups theirs."
                    )

    def _check_rates(self, optimizer: Optimizer) -> None:
        """Refuse learning rates that a schedule names and these groups or hyperparameters cannot have."""
        groups = optimizer.param_groups
        for other, schedule in self._others.items():
            schedule.check_no_rate(other.name)
        if self._plateau is not None:
            self._plateau.schedule.check_groups([group.get("name") for group in groups])
        for index, group in enumerate(groups):
            schedule = self.group_schedules.get(group.get("name", ""), self.schedule)
            if schedule.is_absolute:
                peak = float(group.get("initial_lr", group["lr"]))
                schedule.check_peak(peak, f"group {group.get('name', index)!r}")

    def _check(self, horizon: Horizon, optimizer: Optimizer) -> None:
        for schedule in (self.schedule, *self.group_schedules.values(), *self._others.values()):
            schedule.phases(horizon)
        total = horizon.total_steps or _SAMPLES
        for other, schedule in self._others.items():
            bases = [float(other.base(group)) for group in optimizer.param_groups]
            curve = schedule.over(horizon)
            for index in range(_SAMPLES):
                multiplier = curve(round(index * total / (_SAMPLES - 1)))
                for base in bases:
                    other.check(base * multiplier)

    def __getstate__(self) -> dict[str, Any]:
        # A copy compiles its schedules anew: what `over` returns cannot be pickled, and would still be the original's.
        return {**vars(self), "_curves": {}, "_at_peak": {}, "_compiled_for": None}

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the length of the run and the schedules as text. Peaks are in the optimizer's groups."""
        total, per_epoch = _lengths(self.horizon or Horizon())
        state = {
            "last_epoch": self.last_epoch,
            "total_steps": total,
            "steps_per_epoch": per_epoch,
            "schedules": self._written(),
        }
        if self._plateau is not None:
            state["plateau"] = self._plateau.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`, and set the rates that follow from it.

        Raises:
            ValueError: The state is that of other schedules, and the checkpoint takes precedence.
        """
        self._compare(state_dict.get("schedules", {}))
        self.last_epoch = int(state_dict["last_epoch"])
        if self._plateau is not None and "plateau" in state_dict:
            self._plateau.load_state_dict(state_dict["plateau"])
        if state_dict.get("total_steps") is not None:
            self._saved_horizon = Horizon(state_dict["total_steps"], state_dict["steps_per_epoch"])
        self._restored = True
        self._order_is_known |= self.last_epoch > 0
        if self.horizon is not None:
            self.horizon = self._agreed(self.horizon)
        self._apply()

    def _written(self) -> dict[str, str]:
        """Every schedule as text, by what it drives."""
        others = {other.name: repr(schedule) for other, schedule in self._others.items()}
        groups = {f"lr of {name}": repr(schedule) for name, schedule in self.group_schedules.items()}
        return {"lr": repr(self.schedule), **others, **groups}

    def _compare(self, saved: Mapping[str, str]) -> None:
        saved = {key: _FORMER_NAMES.sub(r"\1StepDecay(", written) for key, written in saved.items()}
        present = {key: _FORMER_NAMES.sub(r"\1StepDecay(", written) for key, written in self._written().items()}
        changes = [
            f"{key}: {saved.get(key, 'none')} → {present.get(key, 'none')}"
            for key in {**saved, **present}
            if saved and saved.get(key) != present.get(key)
        ]
        if not changes:
            return
        if not self._from_config:
            raise ValueError(
                f"The checkpoint's schedule is not the one configured: {'; '.join(changes)}. Configure the former, or "
                'say on_resume="config" to go on with the latter from the step reached.'
            )
        self._tell(f"Resumed with the configuration's schedule: {'; '.join(changes)}.", False)

    def _agreed(self, present: Horizon) -> Horizon:
        """The length that applies: that of this run, or the one in the checkpoint."""
        saved = self._saved_horizon
        if saved is None or saved.total_steps == present.total_steps:
            return present if saved is None or self._from_config else saved
        lengths = f"the checkpoint's schedule ends at step {saved.total_steps}, this run at {present.total_steps}"
        self._saved_horizon = None if self._from_config else saved
        if self._from_config:
            self._tell(f"Resumed with the schedule stretched: {lengths}.", False)
            return present
        self._tell(
            f'Resumed on the old curve, constant beyond its end: {lengths}. Say on_resume="config" to stretch it.', True
        )
        return saved


def _once(value: Callable[[Schedule], float]) -> Callable[[Schedule], float]:
    """``value``, called once for each schedule: several groups share one, and all of a step are evaluated together."""
    values: dict[int, float] = {}

    def of(schedule: Schedule) -> float:
        if id(schedule) not in values:
            values[id(schedule)] = value(schedule)
        return values[id(schedule)]

    return of


def _lengths(horizon: Horizon) -> tuple[int | None, float | None]:
    return horizon.total_steps, horizon.steps_per_epoch
