"""Running count, mean and maximum of a number between two reports, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.core.host import widest_dtype

_AT_ONCE = 64


class Interval:
    """Count, mean and maximum of the finite values seen since they were last taken; the host never waits.

    A mean alone hides a spike of one step, and smoothing hides it once more: so the maximum is kept as well.

    Args:
        device: Where the values are.

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
        """Add one value, shape [], which must not change afterwards; NaN and infinities are left out."""
        # Every step does this, so what is computed is computed for many at once.
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
        """(count, sum), shape [2], and the maximum, shape []; starts anew. Both add up over ranks."""
        self._add_up()
        sums, largest = self._sums.clone(), self._largest.clone()
        self._sums.zero_()
        self._largest.fill_(-torch.inf)
        return sums, largest

    def take(self) -> Tensor:
        """Count, mean and maximum, shape [3]; NaN for the latter two if there was nothing. Starts anew."""
        return summarise(*self.take_sums())


def summarise(sums: Tensor, largest: Tensor) -> Tensor:
    """Count, mean and maximum, shape [3], from what `Interval.take_sums` gives."""
    count, total = sums
    return torch.stack([count, total / count, torch.where(count > 0, largest, torch.nan)])
