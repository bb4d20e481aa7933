"""The hyperparameters of an optimizer's groups that schedules drive: set, taken over from others, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.core.durations import Horizon
from lightning_optim.core.ranges import ranges_of
from lightning_optim.schedules.base import Schedule
from lightning_optim.schedules.checks import SAMPLES, check_values
from lightning_optim.schedules.hyperparameters import LR, Hyperparameter, hyperparameter
from lightning_optim.schedules.rates import Group, GroupRates, Value
from lightning_optim.schedules.written import Written


class Driven:
    """Writes learning rates and other scheduled hyperparameters into the groups of an optimizer.

    Args:
        optimizer: The optimizer.
        schedule: The schedule of the learning rates.
        schedules: Schedules of other hyperparameters, by name.
        tell_once: Reports a message, the first time for its topic.

    Raises:
        ValueError: A hyperparameter is unknown.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        schedules: Mapping[str, Schedule],
        tell_once: Callable[[str, str], None],
    ) -> None:
        self._optimizer = optimizer
        self._tell_once = tell_once
        self.rates = GroupRates(schedule)
        self.rates.take_schedules(optimizer.param_groups)
        owner, ranges = type(optimizer).__name__, ranges_of(type(optimizer))
        self.others: dict[Hyperparameter, Schedule] = {
            hyperparameter(name, optimizer.defaults, owner, ranges): given for name, given in schedules.items()
        }
        self._applied = 0.0  # the multiplier of the rates as they are; 0 before there are any
        self._written = {driven: Written(driven) for driven in (LR, *self.others)}
        self._held: dict[int, float] = {}  # rates that others have set while the schedule's was 0, by place

    @property
    def _groups(self) -> list[Group]:
        return self._optimizer.param_groups

    def move_to(self, optimizer: Optimizer) -> None:
        """Write into another optimizer from now on.

        Raises:
            ValueError: It does not have a hyperparameter that is driven.
        """
        owner, ranges = type(optimizer).__name__, ranges_of(type(optimizer))
        self.others = {
            hyperparameter(h.name, optimizer.defaults, owner, ranges): given for h, given in self.others.items()
        }
        self._written = {driven: Written(driven) for driven in (LR, *self.others)}
        self._optimizer = optimizer
        self._held.clear()

    def schedules(self) -> list[Schedule]:
        """Return all schedules as they are configured."""
        return [*self.rates.schedules(), *self.others.values()]

    def in_use(self) -> Iterator[Schedule]:
        """Yield the schedules that groups follow, as multipliers, each once; that of the first group first."""
        known: set[int] = set()
        for schedule in (*(found for found, _ in self.rates.in_use(self._groups)), *self.others.values()):
            if id(schedule) not in known:
                known.add(id(schedule))
                yield schedule

    def as_text(self) -> dict[str, str]:
        """Return every schedule as text, by what it drives."""
        others = {other.name: repr(schedule) for other, schedule in self.others.items()}
        groups = {f"lr of {name}": repr(schedule) for name, schedule in self.rates.own.items()}
        return {"lr": repr(self.rates.schedule), **others, **groups}

    # Setting.

    def learning_rates(self, value: Value) -> list[float | Tensor]:
        """Return the learning rate of each group; tensors of shape [] where a group has one."""
        groups = self._groups
        if any("schedule" in group or "initial_lr" not in group for group in groups):
            self._take_in_new_groups()
        rates = self.rates.of(groups, value)
        for index, held in list(self._held.items()):
            if index < len(rates) and not float(rates[index]):
                rates[index] = held
            else:
                del self._held[index]
        return rates

    def apply(self, value: Value) -> list[float | Tensor]:
        """Set everything that is driven, and return the learning rates."""
        groups = self._groups
        for group, lr in zip(groups, self.learning_rates(value), strict=True):
            LR.write(group, lr)
        self._applied = self.rates.shared_multiplier(groups[0], value)
        for other, schedule in self.others.items():
            multiplier = value(schedule)
            for group in groups:
                other.write(group, other.base(group) * multiplier)
        for written in self._written.values():
            written.record(groups)
        # Copies, as torch promises of get_last_lr: a rate that is a tensor changes in place.
        return [LR.read(group) for group in groups]

    def _take_in_new_groups(self) -> None:
        self.rates.take_schedules(self._groups)
        for group in self._groups:
            if self._applied and "initial_lr" not in group:  # Its rate is that of the present step.
                group["initial_lr"] = group["lr"] / self._applied
                if group.get("peak_lr_from", "given") != "given":  # of our optimizers, for decay that refers to it
                    group["peak_lr"] = float(group["initial_lr"])
            LR.base(group)

    # Values that others have written.

    def take_over(self, value: Value, step: int, is_placed: bool) -> None:
        """Make what others have written the schedule's: peaks with which it gives just that now.

        Args:
            value: The present value of a schedule.
            step: Steps taken, for the message.
            is_placed: Whether the length of the run is known. Before that rates are peaks: those that a finder sets.
        """
        if changed := dict(self._written[LR].changed(self._groups)):
            rates = {index: float(group["lr"]) for index, group in changed.items()}
            if is_placed or len(rates) < len(self._groups) or len(set(rates.values())) > 1:
                self._take_over_rates(rates, value, step)
            else:
                self._take_over_peak(next(iter(rates.values())))
        for other, schedule in self.others.items():
            for index, group in self._written[other].changed(self._groups):
                if multiplier := value(schedule):
                    group[other.base_key] = other.read(group) / multiplier
                    self._tell_once(
                        other.name,
                        f"{other.name} of group {group.get('name', index)} was set by others after step {step}: its "
                        "schedule continues from that value. Further changes are taken over without a message.",
                    )

    def forget_written(self) -> None:
        """Take whatever is in the groups as it is: a state has been loaded."""
        for written in self._written.values():
            written.forget()

    def _take_over_rates(self, rates: Mapping[int, float], value: Value, step: int) -> None:
        groups = self._groups
        for index, rate in rates.items():
            if multiplier := self.rates.multiplier(index, groups[index], value):
                self.rates.set_peak(groups[index], rate / multiplier)
            else:
                self._held[index] = rate
        named = ", ".join(f"{groups[index].get('name', index)}: {rate:.6g}" for index, rate in rates.items())
        self._tell_once(
            "written",
            f"Learning rates were set by others after step {step} ({named}): the schedule continues from them, with "
            "peaks changed by as much. Further changes are taken over without a message.",
        )

    def _take_over_peak(self, rate: float) -> None:
        """One rate for all groups is that of the optimizer as a whole; groups keep their ratios to it."""
        default = float(self._optimizer.defaults.get("lr", 0.0))
        for group in self._groups:
            before = self.rates.peak(group["initial_lr"])
            factor = rate / (default or before or 1.0)
            if "peak_lr" in group:
                group["peak_lr"] *= factor  # to which our optimizers refer weight decay
            self.rates.set_peak(group, before * factor)
        self._tell_once("finder", f"The learning rate {rate:.6g} that was set before training is the peak now.")

    # Checks.

    def check(self, horizon: Horizon) -> None:
        """Refuse schedules that do not fit a run.

        Raises:
            ValueError: A schedule does not fit, gives no multiplier, or would take a hyperparameter out of its range.
        """
        for schedule in self.schedules():
            schedule.phases(horizon)
        peaks = {id(schedule): (schedule, peak) for schedule, peak in self.rates.in_use(self._groups)}
        for schedule, peak in peaks.values():
            check_values(schedule, horizon, "lr", peak)
        total = horizon.total_steps or SAMPLES
        for other, schedule in self.others.items():
            bases = [float(other.base(group)) for group in self._groups]
            curve = schedule.over(horizon)
            for index in range(SAMPLES):
                multiplier = curve(round(index * total / (SAMPLES - 1)))
                for base in bases:
                    other.check(base * multiplier)

    def check_peaks(self) -> None:
        """Refuse learning rates that a schedule names and these groups or hyperparameters cannot have.

        Raises:
            ValueError: There is one.
        """
        for other, given in self.others.items():
            given.check_no_rate(other.name)
        self.rates.check(self._groups)

    def check_resumable(self, last_epoch: Any) -> None:
        """Refuse to continue without a state after ``last_epoch + 1`` steps.

        Raises:
            KeyError: A group does not have its peaks.
            ValueError: ``last_epoch`` is invalid, or does not say all that the schedule has to know.
        """
        if isinstance(last_epoch, bool) or not isinstance(last_epoch, int) or last_epoch < -1:
            raise ValueError(f"Invalid last_epoch={last_epoch!r}: must be a whole number of steps, or -1 for none.")
        if self.rates.plateau is not None:
            raise ValueError(
                f"last_epoch={last_epoch} does not say how often {self.rates.schedule!r} has reduced the rates. Save "
                "its state_dict(), and load it."
            )
        for driven in (LR, *self.others):
            for index, group in enumerate(self._groups):
                if driven.base_key not in group:
                    raise KeyError(
                        f"param '{driven.base_key}' is not specified in param_groups[{index}] when resuming with "
                        f"last_epoch={last_epoch}: it is the value at the peak, which the present one is not. Load the "
                        "optimizer's state first, or give the groups theirs."
                    )

    def __getstate__(self) -> dict[str, Any]:
        # What has been written into the original's groups says nothing about a copy's.
        return {**vars(self), "_written": {driven: Written(driven) for driven in self._written}}
