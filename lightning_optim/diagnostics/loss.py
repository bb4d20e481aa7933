"""The loss between two reports: its mean, its maximum, and the robust z-score of the maximum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_optim.core.interval import Interval, summarise

WINDOW = 128
_TO_SIGMA = 1.4826
"""Standard deviation over median absolute deviation, for a normal distribution."""


class LossHistory:
    """Statistics of the losses since the last report and of the last `WINDOW` losses, kept on the device.

    Args:
        device: Device of the losses.

    Example:
        >>> history = LossHistory(torch.device("cpu"))
        >>> for loss in (1.0, 1.5, 2.0, 7.0):
        ...     history.add(torch.tensor(loss))
        >>> mean, largest, z = history.take().tolist()
        >>> mean, largest, round(z, 2)
        (2.875, 7.0, 7.42)
    """

    TAGS = ("optim_loss/mean", "optim_loss/max", "optim_loss/robust_z")

    def __init__(self, device: torch.device) -> None:
        self._interval = Interval(device)
        self._window = torch.full((WINDOW,), torch.nan, device=device)
        self._seen = 0

    def add(self, loss: Tensor) -> None:
        """Add a loss, shape []."""
        self._interval.add(loss.detach().clone())  # The loss may be a view of a large tensor, or change later.
        self._window[self._seen % WINDOW] = loss
        self._seen += 1

    def take(self, reduce: Callable[[Tensor, str], Tensor] = lambda values, how: values) -> Tensor:
        """Return mean and maximum since the last call, and the robust z-score of the maximum.

        The z-score is (max − median) / (1.4826·MAD) over the window, where MAD is the median absolute deviation; it is
        NaN while all losses are equal. The medians are torch's: the lower of the two middle values.

        Args:
            reduce: Called with values and "sum" or "max", to reduce them over all ranks.

        Returns:
            Mean, maximum and z-score, shape [3].
        """
        sums, largest = self._interval.take_sums()
        _, mean, largest = summarise(reduce(sums, "sum"), reduce(largest, "max"))
        known = torch.where(self._window.isfinite(), self._window, torch.nan)
        median = known.nanmedian()
        spread = _TO_SIGMA * (known - median).abs().nanmedian()
        z = torch.where(spread > 0, (largest - median) / spread, torch.nan)
        return torch.stack([mean, largest, z])
