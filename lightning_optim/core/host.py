"""Reading one-element tensors on the host, and the widest floating-point dtype of a device."""

from __future__ import annotations

import torch
from torch import Tensor


def read(tensor: Tensor) -> float:
    """Return the value of a one-element CPU tensor from its memory, without dispatching an operator."""
    return float(tensor.detach().resolve_neg().numpy().reshape(()))


def is_set(skip: Tensor | None) -> bool:
    """Return whether the flag ``skip``, shape [], on the CPU, is given and non-zero."""
    return skip is not None and read(skip) != 0


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64 if the device supports it, otherwise float32."""
    return torch.float32 if device.type == "mps" else torch.float64
