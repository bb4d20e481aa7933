"""Optimizers by name."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from lightning_optim.messages import nearest

AdamW = torch.optim.AdamW
SGD = torch.optim.SGD

_OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD}


def get_optimizer_class(name: str) -> type[Optimizer]:
    """The optimizer class called ``name``."""
    if name.lower() not in _OPTIMIZERS:
        raise ValueError(f"Unknown optimizer {name!r}. {nearest(name, _OPTIMIZERS)}")
    return _OPTIMIZERS[name.lower()]
