"""Numbers of elements of many tensors, and the blocks into which kernels divide them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import numpy.typing as npt

Split = Callable[[tuple[int, ...], int], npt.NDArray[np.int64]]
"""A function like `compiled.split`."""


class Sizes:
    """Numbers of elements of the tensors of a batch, which do not change as long as the batch is valid.

    Args:
        numel: Number of elements of each tensor.
    """

    def __init__(self, numel: tuple[int, ...]) -> None:
        self.numel = numel
        self._blocks: dict[int, npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.numel)

    @cached_property
    def total(self) -> int:
        """Number of elements of all tensors."""
        return sum(self.numel)

    def blocks(self, size: int, split: Split) -> npt.NDArray[np.int64]:
        """Return blocks of up to ``size`` elements, computed once by ``split``."""
        blocks = self._blocks.get(size)
        if blocks is None:
            blocks = self._blocks[size] = split(self.numel, size)
        return blocks
