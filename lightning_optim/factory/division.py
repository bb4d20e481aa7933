"""Division of an optimizer's work over the ranks of a Trainer that all have the same weights and gradients."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer


def divide_work(optimizer: Optimizer, module: Any) -> None:
    """Let ``optimizer`` divide its work over the ranks of DDP, unless its `divide_over` has been set.

    It is left alone where gradients may differ between ranks, which communication hooks, model averaging and parameters
    that DDP is told to ignore allow.

    Args:
        optimizer: The optimizer; one of another package is left alone.
        module: The LightningModule; without a Trainer there is nothing to divide.
    """
    if getattr(optimizer, "divide_over", False) is not None:
        return
    try:
        strategy = module.trainer.strategy
    except (AttributeError, RuntimeError):  # Lightning's property raises the latter
        return
    if not any(cls.__name__ == "DDPStrategy" for cls in type(strategy).__mro__):
        return
    if getattr(module, "_ddp_params_and_buffers_to_ignore", None):  # experts of one rank, say
        return
    changes = ("_ddp_comm_state", "_ddp_comm_hook", "_model_averaging_period")
    if any(getattr(strategy, name, None) is not None for name in changes):
        return
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return
    optimizer.divide_over = dist.group.WORLD  # type: ignore[attr-defined]


def undivide_work(optimizer: Optimizer) -> None:
    """Undo `divide_work` at the end of a fit: a step of one rank must not wait for the others from then on."""
    if dist.is_available() and getattr(optimizer, "divide_over", False) is dist.group.WORLD:
        optimizer.divide_over = None  # type: ignore[attr-defined]
