"""The 0-d state of many tensors, read and written at once on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Numbers(Protocol):
    """The values of 0-d tensors in the CPU's memory, which they keep as long as this is used."""

    def read(self) -> npt.NDArray[np.float64]:
        """Return the values, shape [tensors]."""

    def write(self, values: npt.NDArray[np.float64]) -> None:
        """Write new values, shape [tensors], rounded to the dtype of each tensor."""


class Views:
    """Implementation of `Numbers` by views of numpy, for any dtype.

    Args:
        tensors: The tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._views = [tensor.numpy() for tensor in tensors]

    def read(self) -> npt.NDArray[np.float64]:
        """See `Numbers`."""
        return np.array([view.item() for view in self._views], dtype=np.float64)

    def write(self, values: npt.NDArray[np.float64]) -> None:
        """See `Numbers`."""
        for view, value in zip(self._views, values.tolist(), strict=True):
            view[()] = value


MANY = 32
"""Number of tensors from which a compiled loop is worth its compilation."""

compiled: Callable[[Sequence[Tensor]], Numbers] | None = None
"""A faster implementation for float32 and float64; the CPU backend sets it when it is loaded."""


def numbers_of(tensors: Sequence[Tensor]) -> Numbers:
    """Return the fastest `Numbers` of 0-d tensors on the CPU, of which there may be thousands."""
    dtypes = {tensor.dtype for tensor in tensors}
    if compiled is not None and len(tensors) >= MANY and len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}:
        return compiled(tensors)
    return Views(tensors)
