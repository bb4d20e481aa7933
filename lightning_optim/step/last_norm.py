"""An estimate of the global norm of gradients while the backward pass still computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.core.host import widest_dtype
from lightning_optim.step.gradients import Gradients, ReadGradStats


class LastNorm:
    """The global norm of the last step, or of the gradients of this step so far where that is larger.

    In the first step there is no last one, so that the estimate is the norm of the gradients so far. A gradient that is
    not finite does not enter it.

    Args:
        device: Device of the gradients.

    Example:
        >>> norm = LastNorm(torch.device("cpu"))
        >>> norm.add(torch.tensor([9.0]))
        >>> norm.add(torch.tensor([16.0]))
        >>> norm.end()
        >>> norm.estimate(torch.tensor([4.0])).item(), norm.estimate(torch.tensor([36.0])).item()
        (5.0, 6.0)
    """

    def __init__(self, device: torch.device) -> None:
        self.last_sq = torch.zeros((), dtype=widest_dtype(device), device=device)
        self._so_far_sq = torch.zeros_like(self.last_sq)

    def estimate(self, norm_sq: Tensor) -> Tensor:
        """Return the estimate for the next gradient.

        Args:
            norm_sq: Square sum of that gradient, shape [1].

        Returns:
            The norm, shape [].
        """
        return torch.maximum(self.last_sq, self._so_far_sq + norm_sq.sum()).sqrt()

    def add(self, norm_sq: Tensor) -> None:
        """Add a gradient of this step, by its square sum, shape [1]."""
        total = norm_sq.sum().to(self._so_far_sq)
        self._so_far_sq = self._so_far_sq + torch.where(total.isfinite(), total, 0.0)

    def end(self) -> None:
        """End the step; one without a finite gradient leaves the last norm as it is."""
        self.last_sq = torch.where(self._so_far_sq > 0, self._so_far_sq, self.last_sq)
        self._so_far_sq = torch.zeros_like(self._so_far_sq)

    def load(self, last_sq: Tensor) -> None:
        """Restore ``last_sq`` of a checkpoint, shape []."""
        self.last_sq = last_sq.to(self.last_sq)


class LastNormStats(ReadGradStats):
    """Statistics of one gradient whose global norm is an estimate.

    Args:
        gradients: The one gradient.
        norm: The estimate.
    """

    def __init__(self, gradients: Gradients, norm: LastNorm) -> None:
        super().__init__(gradients)
        self._norm = norm

    def total_norm(self) -> Tensor:
        """Return the estimate, shape []."""
        return self._norm.estimate(self.norm_sq)
