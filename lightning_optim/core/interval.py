"""Running count, mean and maximum of a scalar between two reports, accumulated on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.core.host import widest_dtype

_AT_ONCE = 64


class Interval:
    """Count, mean and maximum of the finite values since the last reset, without host synchronisation.

    A mean hides a spike of a single step, and smoothing hides it further, so the maximum is recorded as well.

    Args:
        device: Device of the values.

    Example:
        >>> interval = Interval(torch.device("cpu"))
        >>> for value in (1.0, 3.0, float("nan")):
        ...     interval.add(torch.tensor(value))
        >>> interval.take().tolist()
        [2.0, 2.0, 3.0]
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=widest_dtype(device), device=device)
        self._largest = torch.full((), -torch.inf, dtype=self._sums.dtype, device=device)
        self._waiting: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Add one value, shape [], which must not change afterwards; NaN and infinities are ignored."""
        # This runs at every step, so values are collected and reduced many at a time.
        self._waiting.append(value.detach())
        if len(self._waiting) == _AT_ONCE:
            self._add_up()

    def _add_up(self) -> None:
        if not self._waiting:
            return
        values = torch.stack([value.to(self._sums) for value in self._waiting])
        self._waiting.clear()
        finite = values.isfinite()
        self._sums += torch.stack([finite.to(values.dtype), torch.where(finite, values, 0.0)]).sum(dim=1)
        torch.maximum(self._largest, torch.where(finite, values, -torch.inf).max(), out=self._largest)

    def take_sums(self) -> tuple[Tensor, Tensor]:
        """Return (count, sum), shape [2], and the maximum, shape [], and reset; both can be reduced over ranks."""
        self._add_up()
        sums, largest = self._sums.clone(), self._largest.clone()
        self._sums.zero_()
        self._largest.fill_(-torch.inf)
        return sums, largest

    def take(self) -> Tensor:
        """Return count, mean and maximum, shape [3], and reset; without values, mean and maximum are NaN."""
        return summarise(*self.take_sums())


def summarise(sums: Tensor, largest: Tensor) -> Tensor:
    """Return count, mean and maximum, shape [3], from the results of `Interval.take_sums`."""
    count, total = sums
    return torch.stack([count, total / count, torch.where(count > 0, largest, torch.nan)])
