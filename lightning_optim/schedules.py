"""Schedules: pure functions from the optimizer step to a multiplier, and the scheduler that applies one.

A schedule never sees an optimizer. It says by what the peak learning rate is multiplied at a step, so it can be
plotted, tested and composed; `Scheduler` multiplies each group's own peak, which keeps the groups' ratios.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim.durations import Duration, Horizon
from lightning_optim.messages import nearest

__all__ = ["Constant", "Cosine", "Linear", "Schedule", "Scheduler", "get_schedule", "list_schedules"]


class Schedule(ABC):
    """A multiplier of the peak learning rate as a function of the step: a linear warmup, then a shape.

    ``step`` counts the updates already taken, so the first update uses ``schedule(0, ...)``. The warmup of ``n`` steps
    uses 1/n, 2/n, ..., n/n: never the full rate at step 0, never a rate of zero. The shape starts with a multiplier of
    1 right after it, and reaches its end at ``total_steps``.

    To write one, subclass, and define `shape`, and `needs_total` if it can do without the length of the run.

    Args:
        warmup: Length of the linear warmup: ``500``, ``"500 steps"``, ``"2 epochs"`` or ``"5%"`` of the run.

    Raises:
        ValueError: The warmup cannot be read, or (when called) it is longer than the run, or the schedule needs the
            length of the run and none is given.
    """

    shape_needs_total = True

    def __init__(self, warmup: int | str | Duration = 0) -> None:
        self.warmup = Duration.parse(warmup)

    @abstractmethod
    def shape(self, step: int, total_steps: int) -> float:
        """The multiplier ``step`` steps after the warmup, of a shape that is ``total_steps`` long."""

    @property
    def needs_total(self) -> bool:
        """Whether the schedule is undefined without the length of the run."""
        return self.shape_needs_total or self.warmup.is_relative

    def __call__(self, step: int, total_steps: int | None = None, steps_per_epoch: float | None = None) -> float:
        """The multiplier for the update that follows ``step`` updates; constant beyond ``total_steps``."""
        horizon = Horizon(total_steps, steps_per_epoch)
        warmup = self.warmup_steps(horizon)
        if step < warmup:
            return (step + 1) / warmup
        if not self.shape_needs_total:
            return self.shape(step - warmup, 0)
        assert total_steps is not None  # warmup_steps has refused it
        return self.shape(min(step, total_steps) - warmup, total_steps - warmup)

    def warmup_steps(self, horizon: Horizon) -> int:
        """The warmup in steps of a run of this length; refuses a run that it does not fit."""
        if self.needs_total and horizon.total_steps is None:
            raise ValueError(
                f"{self} needs the length of the run, and nothing bounds it. Give the Trainer `max_steps`, or a "
                "dataset whose length is known together with `max_epochs`; or use a schedule that needs no length: "
                "`constant` with its warmup in steps."
            )
        warmup = self.warmup.steps(horizon)
        if horizon.total_steps is not None and warmup > horizon.total_steps:
            raise ValueError(
                f"{self}: the warmup of {warmup} steps is longer than the run of {horizon.total_steps} optimizer "
                "steps. Shorten it, or write it as a share of the run, for instance '5%'."
            )
        return warmup

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{key}={str(value) if isinstance(value, Duration) else value!r}" for key, value in vars(self).items()
        )
        return f"{type(self).__name__}({arguments})"


class Constant(Schedule):
    """The peak learning rate throughout, after the warmup. Needs no length of the run.

    Args:
        warmup: Length of the linear warmup; ``0`` for none.

    Example:
        >>> schedule = Constant(warmup=4)
        >>> [schedule(step) for step in (0, 1, 3, 4, 1000)]
        [0.25, 0.5, 1.0, 1.0, 1.0]
    """

    shape_needs_total = False

    def shape(self, step: int, total_steps: int) -> float:
        """Always 1."""
        return 1.0


class _Decay(Schedule):
    def __init__(self, warmup: int | str | Duration = 0, final: float = 0.0) -> None:
        super().__init__(warmup)
        if not 0 <= final <= 1:
            raise ValueError(
                f"Invalid final={final!r} of {type(self).__name__}: it is a multiplier of the peak learning rate, so "
                "it must lie in [0, 1]."
            )
        self.final = float(final)


class Linear(_Decay):
    """A straight line from 1, right after the warmup, to ``final`` at ``total_steps``; constant after.

    Args:
        warmup: Length of the linear warmup; ``0`` for none.
        final: Multiplier reached at ``total_steps``, in [0, 1].

    Example:
        >>> [Linear(final=0.5)(step, 100) for step in (0, 50, 100, 200)]
        [1.0, 0.75, 0.5, 0.5]
    """

    def shape(self, step: int, total_steps: int) -> float:
        """1 at step 0, ``final`` at ``total_steps``."""
        return self.final + (1 - self.final) * (1 - _progress(step, total_steps))


class Cosine(_Decay):
    """Half a cosine from 1, right after the warmup, to ``final`` at ``total_steps``; constant after.

    Args:
        warmup: Length of the linear warmup; ``0`` for none.
        final: Multiplier reached at ``total_steps``, in [0, 1]. Language models are often trained to 0.1.

    References:
        Loshchilov & Hutter, SGDR, 2017, https://arxiv.org/abs/1608.03983, equation 5 without restarts.

    Example:
        >>> [Cosine()(step, 100) for step in (0, 50, 100)]
        [1.0, 0.5, 0.0]
        >>> Cosine(warmup="10%", final=0.1)(0, 100)
        0.1
    """

    def shape(self, step: int, total_steps: int) -> float:
        """1 at step 0, ``final`` at ``total_steps``."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * _progress(step, total_steps))) / 2


def _progress(step: int, total_steps: int) -> float:
    # A warmup as long as the run leaves a shape of no steps: it is at its end.
    return min(step / total_steps, 1.0) if total_steps > 0 else 1.0


_SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant, "cosine": Cosine, "linear": Linear}


def list_schedules() -> list[str]:
    """The names that `get_schedule` knows."""
    return sorted(_SCHEDULES)


def get_schedule(name: str) -> type[Schedule]:
    """The schedule class called ``name``.

    Raises:
        ValueError: There is none; the message names the nearest.
    """
    key = name.lower()
    if key not in _SCHEDULES:
        raise ValueError(f"Unknown schedule {name!r}. {nearest(name, _SCHEDULES)}")
    return _SCHEDULES[key]


class Scheduler(LRScheduler):
    """Sets each group's learning rate to its own peak times a schedule, once per optimizer step.

    The peak is the group's ``lr`` when the scheduler is made, kept as ``initial_lr`` in the group (torch's name); a
    group added later follows from then on at its own peak. Rates are always computed from the closed form, never from
    the previous rate, so nothing drifts over a resume.

    Args:
        optimizer: The optimizer whose groups are driven.
        schedule: The multiplier as a function of the step.
        horizon: Length of the run. None if it is not known yet: the optimizer keeps its rates until
            [`resolve`][lightning_optim.schedules.Scheduler.resolve] is called, which has to be before the first step.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
        >>> scheduler = Scheduler(optimizer, Linear(warmup=2), Horizon(total_steps=10))
        >>> optimizer.param_groups[0]["lr"]
        0.2
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, horizon: Horizon | None = None) -> None:
        self.schedule = schedule
        self.horizon = horizon
        self.asks_for_horizon = horizon is None
        self._restored = False
        self._skipped_steps: Callable[[], int] = lambda: 0
        self._skips_seen = 0
        if horizon is not None:
            schedule.warmup_steps(horizon)
        super().__init__(optimizer)

    def resolve(self, horizon: Horizon) -> None:
        """Learns the length of the run and sets the rates of the coming step."""
        self.schedule.warmup_steps(horizon)
        self.horizon = horizon
        self._apply()

    def hold_on(self, skipped_steps: Callable[[], int]) -> None:
        """Stands still for steps that did not happen.

        Args:
            skipped_steps: Returns how many optimizer steps have been skipped so far; asked after each step.
        """
        self._skipped_steps = skipped_steps
        self._skips_seen = skipped_steps()

    def step(self, epoch: int | None = None) -> None:
        """Moves on by one step, less the steps found to have been skipped since the last call."""
        if epoch is not None:
            raise ValueError(f"Scheduler.step() counts optimizer steps and takes no epoch, got epoch={epoch}.")
        skipped = self._skipped_steps()
        self.last_epoch += 1 - (skipped - self._skips_seen)
        self._skips_seen = skipped
        self._apply()

    @property
    def is_fresh(self) -> bool:
        """Whether it stands at its start and has not been brought there by a checkpoint."""
        return self.last_epoch == 0 and not self._restored

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at the current step."""
        factor = self.multiplier()
        return [group["initial_lr"] * factor for group in self.optimizer.param_groups]

    def multiplier(self) -> float:
        """The schedule's value at the current step; 1 as long as the length of the run is not known."""
        if self.horizon is None:
            return 1.0
        return self.schedule(max(self.last_epoch, 0), self.horizon.total_steps, self.horizon.steps_per_epoch)

    def _apply(self) -> None:
        for group in self.optimizer.param_groups:
            if "initial_lr" not in group:  # added after the scheduler was made
                group["initial_lr"] = _copy(group["lr"])
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        # Copies, as torch promises of get_last_lr: a tensor rate goes on changing in place.
        self._last_lr = [_copy(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: the position. Peaks live in the optimizer's groups, the shape in the configuration."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the saved position; the rates follow from it at once."""
        self.last_epoch = int(state_dict["last_epoch"])
        self._restored = True
        self._apply()


def _copy(lr: float | Tensor) -> float | Tensor:
    return lr.clone() if isinstance(lr, Tensor) else lr
