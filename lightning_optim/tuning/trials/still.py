"""A scheduler that leaves the rates alone, in the place of the real one for the time of a trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Still(LRScheduler):
    """Does nothing in `step`, whoever calls it.

    Our own schedulers see that another one is in their place, and stand still.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # torch's constructor would take a first step, and wrap the optimizer's.
        self.optimizer = optimizer
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.last_epoch = 0

    def step(self, *_: Any) -> None:
        """Do nothing; the metric of a plateau's scheduler is accepted, too."""

    def get_last_lr(self) -> list[Any]:
        """Return the present rates."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


def still_in_place_of(configs: Sequence[LRSchedulerConfig], optimizers: Sequence[Optimizer]) -> list[LRSchedulerConfig]:
    """Return a scheduler that stands still for each that there is, in their order, and for each optimizer with none.

    Args:
        configs: The schedulers of a Trainer.
        optimizers: Its optimizers.
    """
    owners: list[Any] = [getattr(config.scheduler, "optimizer", None) for config in configs]
    found = [
        replace(config, scheduler=Still(owner or optimizers[0]), reduce_on_plateau=False)
        for config, owner in zip(configs, owners, strict=True)
    ]
    without = [each for each in optimizers if not any(each is owner for owner in owners)]
    return [*found, *(LRSchedulerConfig(Still(optimizer), interval="step") for optimizer in without)]
