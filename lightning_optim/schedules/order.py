"""Whether an optimizer has stepped: the one mark of torch's schedulers that is relied on."""

from __future__ import annotations

import warnings

from torch.optim import Optimizer

_MESSAGE = (
    "Detected call of `lr_scheduler.step()` before `optimizer.step()`: the first learning rate of the schedule has "
    "not been used, and never will be. Call `optimizer.step()` first."
)


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step`` has been called since the first scheduler of torch's kind was made for it.

    ``LRScheduler`` wraps the object's ``step`` and has the wrapper leave a mark. Where another ``step``
    has replaced it since, or it is gone because the optimizer is a copy, this cannot be known: the answer is yes.
    """
    return getattr(optimizer, "_opt_called", False) or not hasattr(optimizer.step, "_wrapped_by_lr_sched")


def warn_of_order(stacklevel: int) -> None:
    """Warn as torch's schedulers do, in the same category and the same first words, which users' filters match."""
    warnings.warn(_MESSAGE, UserWarning, stacklevel=stacklevel + 1)
