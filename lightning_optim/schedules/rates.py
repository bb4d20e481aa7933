"""The learning rates of the groups of an optimizer, from their peaks and the value of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_optim.schedules.base import Schedule
from lightning_optim.schedules.hyperparameters import LR
from lightning_optim.schedules.plateau import Plateau, ReduceOnPlateau

Group = dict[str, Any]
Value = Callable[[Schedule], float]
"""The multiplier that a schedule has at present."""


class GroupRates:
    """Computes the learning rate of each group; knows which schedule each of them follows.

    Args:
        schedule: The schedule of the groups without one of their own.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.own: dict[str, Schedule] = {}
        """Schedules of single groups, by the name of the group."""
        self.plateau = Plateau(schedule) if isinstance(schedule, ReduceOnPlateau) else None
        self._peaks: dict[int, tuple[Tensor, float]] = {}
        self._at_peak: dict[tuple[int, float], tuple[Schedule, Schedule]] = {}

    def schedules(self) -> list[Schedule]:
        """Return the schedules of the learning rate."""
        return [self.schedule, *self.own.values()]

    def take_schedules(self, groups: Iterable[Group]) -> None:
        """Take the schedules that groups bring out of them."""
        for index, group in enumerate(groups):
            if isinstance(own := group.get("schedule"), Schedule):
                del group["schedule"]
                self.own[group.setdefault("name", str(index))] = own

    def check(self, groups: list[Group]) -> None:
        """Refuse learning rates that a schedule names and these groups cannot have.

        Raises:
            ValueError: A schedule names a learning rate that is not below a group's peak, or a group that is not there.
        """
        if self.plateau is not None:
            self.plateau.schedule.check_groups([group.get("name") for group in groups])
        for index, group in enumerate(groups):
            schedule = self.own.get(group.get("name", ""), self.schedule)
            if schedule.is_absolute:
                peak = float(group["initial_lr"] if "initial_lr" in group else group["lr"])
                schedule.check_peak(peak, f"group {group.get('name', index)!r}")

    def of(self, groups: list[Group], value: Value) -> list[float | Tensor]:
        """Return the rate of each group; tensors of shape [] where a group has one."""
        reduced = self.plateau is not None and self.plateau.reductions > 0
        if not (self.own or reduced or self.schedule.is_absolute):  # nearly always, and the quicker way
            multiplier = value(self.schedule)
            return [group["initial_lr"] * multiplier for group in groups]
        return [self._rate(index, group, value) for index, group in enumerate(groups)]

    def multiplier(self, index: int, group: Group, value: Value) -> float:
        """Return the present multiplier of a group's peak."""
        base = self.peak(LR.base(group))
        if base and self.plateau is not None and self.plateau.reductions:
            return float(self._rate(index, group, value)) / base
        own = self.own.get(group.get("name", ""))
        return value(self.at_peak(self.schedule if own is None else own, base))

    def shared_multiplier(self, group: Group, value: Value) -> float:
        """Return the multiplier of groups without a schedule of their own; at the peak of ``group``."""
        multiplier = value(self.at_peak(self.schedule, LR.base(group)))
        return multiplier * (self.plateau.level if self.plateau is not None else 1.0)

    def at_peak(self, schedule: Schedule, base: float | Tensor) -> Schedule:
        """Return the schedule as multipliers of this peak; one object for each schedule and peak."""
        if not schedule.is_absolute:
            return schedule
        key = (id(schedule), self.peak(base))
        known, at_peak = self._at_peak.get(key, (None, schedule))
        if known is not schedule:
            at_peak = schedule.for_peak(key[1])
            self._at_peak[key] = (schedule, at_peak)
        return at_peak

    def peak(self, base: float | Tensor) -> float:
        """Return ``base`` on the host; a tensor is read once only."""
        if not isinstance(base, Tensor):
            return base
        if self._peaks.get(id(base), (None,))[0] is not base:
            self._peaks[id(base)] = (base, float(base))
        return self._peaks[id(base)][1]

    def set_peak(self, group: Group, peak: float) -> None:
        """Give a group another peak."""
        base = group["initial_lr"]
        group["initial_lr"] = torch.full_like(base, peak) if isinstance(base, Tensor) else peak

    def scale_peaks(self, groups: Iterable[Group], factor: float) -> None:
        """Multiply the peaks of groups, and those that decay refers to."""
        for group in groups:
            self.set_peak(group, self.peak(LR.base(group)) * factor)
            if "peak_lr" in group:
                group["peak_lr"] *= factor

    def forget(self) -> None:
        """Convert schedules to multipliers anew: one may have been changed in place."""
        self._at_peak.clear()

    def in_use(self, groups: Iterable[Group]) -> Iterator[tuple[Schedule, float]]:
        """Yield for each group the schedule that it follows, as multipliers, and its peak."""
        for group in groups:
            base = LR.base(group)
            yield self.at_peak(self.own.get(group.get("name", ""), self.schedule), base), self.peak(base)

    def _rate(self, index: int, group: Group, value: Value) -> float | Tensor:
        own = self.own.get(group.get("name", ""))
        base = LR.base(group)
        multiplier = value(self.at_peak(self.schedule if own is None else own, base))
        if own is not None or self.plateau is None or not self.plateau.reductions:
            return base * multiplier
        lowest = self.plateau.schedule.min_lr_of(index, group.get("name"))
        return self.plateau.rate(self.peak(base), lowest) * multiplier

    def __getstate__(self) -> dict[str, Any]:
        # A copy converts its schedules anew: the cache is by the identity of the original's.
        return {**vars(self), "_at_peak": {}, "_peaks": {}}
