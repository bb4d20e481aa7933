"""The scheduler: applies a schedule to an optimizer, once per optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim.durations import Horizon
from lightning_optim.schedules.base import Schedule


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
        >>> from lightning_optim.schedules import Linear
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
            schedule.phases(horizon)
        super().__init__(optimizer)

    def resolve(self, horizon: Horizon) -> None:
        """Learns the length of the run and sets the rates of the coming step."""
        self.schedule.phases(horizon)
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
