"""One-element tensors on the host, and the widest dtype of a device."""

from __future__ import annotations

import torch
from torch import Tensor


def read(tensor: Tensor) -> float:
    """The value of a one-element CPU tensor, from its memory: no operator is dispatched, so nothing is synchronised."""
    return float(tensor.detach().resolve_neg().numpy().reshape(()))


def is_set(skip: Tensor | None) -> bool:
    """Whether ``skip`` (on the CPU) asks for nothing to change."""
    return skip is not None and read(skip) != 0


def widest_dtype(device: torch.device) -> torch.dtype:
    """Float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
