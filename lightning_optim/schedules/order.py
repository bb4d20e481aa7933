"""Detection of whether an optimizer has stepped, from the mark that torch's schedulers leave on it."""

from __future__ import annotations

import warnings

from torch.optim import Optimizer

_MESSAGE = (
    "Detected call of `lr_scheduler.step()` before `optimizer.step()`: the first learning rate of the schedule has "
    "not been used, and never will be. Call `optimizer.step()` first."
)


def has_stepped(optimizer: Optimizer) -> bool:
    """Return whether ``optimizer.step`` has been called since the first ``LRScheduler`` was created for it.

    ``LRScheduler`` wraps the ``step`` of the object, and the wrapper leaves a mark. If the wrapper has been replaced,
    or is missing because the optimizer is a copy, the call cannot be detected and is assumed.
    """
    return getattr(optimizer, "_opt_called", False) or not hasattr(optimizer.step, "_wrapped_by_lr_sched")


def warn_of_order(stacklevel: int) -> None:
    """Warn as torch's schedulers do, with the same category and the same first words, which users' filters match."""
    warnings.warn(_MESSAGE, UserWarning, stacklevel=stacklevel + 1)
