"""Clip rules: from one read of the gradients to the number they are divided by, on the device."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

from lightning_optim.stats import GradStats

__all__ = ["ClipRule", "GlobalNorm"]


class ClipRule(ABC):
    """How much the gradients are scaled down this step.

    A rule never touches a gradient: it returns a divisor, which the update applies while it reads the gradients anyway.
    """

    @abstractmethod
    def __call__(self, stats: GradStats) -> Tensor:
        """The divisor, at least 1, shape [], on the device of ``stats``; must not synchronise with the host."""


class GlobalNorm(ClipRule):
    """Scales all gradients together so that their norm as one vector is at most ``max_norm``.

    The divisor is max(1, (‖g‖ + 1e-6) / max_norm): the reciprocal of what torch's ``clip_grad_norm_`` multiplies by.

    Args:
        max_norm: Largest norm of the gradients that the optimizer sees, above 0; 1.0 is usual for transformers.

    Raises:
        ValueError: ``max_norm`` is not a finite number above 0.

    References:
        Pascanu et al., On the difficulty of training recurrent neural networks, 2013, https://arxiv.org/abs/1211.5063

    Example:
        >>> import torch
        >>> GlobalNorm(max_norm=2.0)(GradStats(torch.tensor([9.0, 16.0]), group_sizes=(2,)))
        tensor(2.5000)
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        if not math.isfinite(max_norm) or max_norm <= 0:
            raise ValueError(
                f"Invalid max_norm={max_norm!r}: it must be a finite number above 0, for instance 1.0. To not clip, "
                "leave gradient clipping out."
            )
        self.max_norm = float(max_norm)

    def __call__(self, stats: GradStats) -> Tensor:
        """The divisor for these gradients, shape []."""
        return ((stats.total_norm() + 1e-6) / self.max_norm).clamp(min=1.0)
