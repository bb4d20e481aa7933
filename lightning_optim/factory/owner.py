"""The LightningModule whose `configure_optimizers` asks for the optimizer of one of its parts."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def owner_of(module: nn.Module) -> Any:
    """Return the LightningModule that is on a Trainer and owns ``module``; None if there is none.

    ``OptimizerFactory(...)(self.generator)`` is given a part that knows neither its owner nor the Trainer. The owner is
    found among the callers: it is the first argument of the ``configure_optimizers`` that is running.

    Args:
        module: The LightningModule itself, or one of its parts.
    """
    if (trainer := _trainer_of(module)) is not None:
        # A LightningModule inside another one has the Trainer, too, which runs the outer one only.
        whole = trainer.lightning_module
        return whole if whole is not None and _owns(whole, module) else module
    frame: Any = sys._getframe(1)
    while frame is not None:
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        caller = frame.f_locals.get(names[0]) if names else None
        if isinstance(caller, nn.Module) and _trainer_of(caller) is not None and _owns(caller, module):
            return caller
        frame = frame.f_back
    return None


def _trainer_of(module: nn.Module) -> Any:
    """The Trainer of a LightningModule, which refuses to be asked for one that it does not have."""
    return vars(module).get("_trainer")


def _owns(owner: nn.Module, part: nn.Module) -> bool:
    return any(part is each for each in owner.modules())
