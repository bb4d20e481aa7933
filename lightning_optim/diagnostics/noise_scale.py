"""The gradient noise scale: an estimate of the batch size beyond which more samples per step gain little."""

from __future__ import annotations

import torch
from torch import Tensor

_DECAY = 0.9


class NoiseScale:
    """The simple noise scale tr(Σ)/|G|², in samples, from the gradient norms of a small and of a large batch.

    Batches far below it are dominated by noise, and doubling them nearly halves the number of steps; far above it, more
    samples per step gain little. Single estimates scatter widely, so numerator and denominator are each averaged over
    reports (decay 0.9) before the division. The scale changes over a run, mostly upward.

    References:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018, https://arxiv.org/abs/1812.06162,
        appendix A.1.

    Args:
        device: Device of the norms.

    Example:
        >>> noise = NoiseScale(torch.device("cpu"))
        >>> noise.add(torch.tensor(5.0), torch.tensor(2.0), small=2, large=8).item()  # |G|² = 1, tr(Σ) = 8
        8.0
    """

    def __init__(self, device: torch.device) -> None:
        self._averages = torch.zeros(2, dtype=torch.float32, device=device)

    def add(self, small_sq: Tensor, large_sq: Tensor, small: float, large: float) -> Tensor:
        """Add a pair of norms, and return the present estimate of the scale.

        Args:
            small_sq: Square norm of the mean gradient of ``small`` samples, shape [].
            large_sq: Square norm of the mean gradient of ``large`` samples, which include those, shape [].
            small: Number of samples of the small batch.
            large: Number of samples of the large batch, above ``small``.

        Returns:
            The scale in samples, float32, shape []; NaN while the two averages are not both positive.
        """
        signal = (large * large_sq - small * small_sq) / (large - small)
        noise = (small_sq - large_sq) / (1 / small - 1 / large)
        now = torch.stack([noise, signal]).to(self._averages)
        self._averages = torch.where(now.isfinite().all(), torch.lerp(now, self._averages, _DECAY), self._averages)
        positive = (self._averages > 0).all()
        return torch.where(positive, self._averages[0] / self._averages[1], torch.nan)
