"""Memory ranges that steps write, to check at each step whether a new gradient overlaps them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lightning_optim.core.sizes import span


class Occupied:
    """Memory ranges of tensors that do not overlap each other, sorted by address.

    Args:
        written: Plain tensors of any shapes.
        grads: Gradients whose shapes and strides are those of later gradients.
    """

    def __init__(self, written: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        spans = np.fromiter(map(span, written), np.int64, len(written))
        first = np.fromiter(map(Tensor.data_ptr, written), np.int64, len(written))[spans > 0]
        order = np.argsort(first)
        self._first = first[order]
        # A sentinel range in front of the first one ends at 0.
        self._ends = np.concatenate([np.zeros(1, np.int64), (first + spans[spans > 0])[order]])
        self._grad_spans = np.fromiter(map(span, grads), np.int64, len(grads))

    def reached_by(self, grads: Sequence[Tensor]) -> bool:
        """Return whether a gradient overlaps the written memory; vectorised, because there may be thousands."""
        return self.reached_at(np.fromiter(map(Tensor.data_ptr, grads), np.int64, len(grads)))

    def reached_at(self, at: np.ndarray) -> bool:
        """Return the same for gradients at the addresses ``at``, int64, [gradients]."""
        before = np.searchsorted(self._first, at + self._grad_spans)  # Count of ranges that start before its end.
        return bool(((self._ends[before] > at) & (self._grad_spans > 0)).any())
