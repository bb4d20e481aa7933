"""The memory that steps write, to see at each step whether a new gradient lies in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lightning_optim.core.sizes import span


class Occupied:
    """Memory of tensors that lie apart from each other, sorted by address.

    Args:
        written: Those tensors, of any shapes; plain ones.
        grads: Gradients of the forms that later ones have, too.
    """

    def __init__(self, written: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        spans = np.fromiter(map(span, written), np.int64, len(written))
        first = np.fromiter(map(Tensor.data_ptr, written), np.int64, len(written))[spans > 0]
        order = np.argsort(first)
        self._first = first[order]
        # What lies before the first of them ends at 0.
        self._ends = np.concatenate([np.zeros(1, np.int64), (first + spans[spans > 0])[order]])
        self._grad_spans = np.fromiter(map(span, grads), np.int64, len(grads))

    def reached_by(self, grads: Sequence[Tensor]) -> bool:
        """Whether a gradient shares memory with what is written; in one call for all, as thousands may be asked for."""
        at = np.fromiter(map(Tensor.data_ptr, grads), np.int64, len(grads))
        before = np.searchsorted(self._first, at + self._grad_spans)  # tensors that begin before the gradient ends
        return bool(((self._ends[before] > at) & (self._grad_spans > 0)).any())
