"""The inspection of one step: statistics of each parameter of an optimizer, and what they belong to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lightning_optim.core.stats import TENSOR_COLUMNS


@dataclass(frozen=True)
class Inspection:
    """The parameters of one optimizer in one step.

    Args:
        step: Number of optimizer steps so far.
        values: `StepRecord.per_tensor`, row by row: [tensors * columns] numbers.
        names: Name of each tensor.
        numel: Number of elements of each tensor.
        groups: Name, learning rate and number of tensors of each group.
        places: Place of each tensor in the optimizer; empty if they are consecutive.
        without: Place and name of each parameter without a gradient that is not frozen on purpose.
        frozen: Those of ``without`` that do not require a gradient.
        lossy: Relative resolution of each tensor in which small updates round to nothing: one of bfloat16 or float16,
            without an option that keeps them; 0 for the others; empty if there are none.
        kept: Indices of the tensors in these dtypes with such an option: an update may be 0 for some steps there.
        clipped: Number of clipped steps so far.
    """

    step: int
    values: Sequence[float]
    names: Sequence[str]
    numel: Sequence[int]
    groups: Sequence[tuple[str, float, int]]
    places: Sequence[int] = ()
    without: Sequence[tuple[int, str]] = ()
    frozen: Collection[int] = ()
    lossy: Sequence[float] = ()
    kept: Collection[int] = ()
    clipped: int = 0

    def sums(self) -> dict[str, float]:
        """Return the sum of each statistic over all tensors, by the names of `TENSOR_COLUMNS`."""
        width = len(TENSOR_COLUMNS)
        values = self.values[: width * len(self.names)]
        return {name: sum(values[i::width]) for i, name in enumerate(TENSOR_COLUMNS)}

    def rows(self) -> list[dict[str, float]]:
        """Return the statistics of each tensor, by the names of `TENSOR_COLUMNS`."""
        width = len(TENSOR_COLUMNS)
        values = [self.values[i * width : (i + 1) * width] for i in range(len(self.names))]
        return [dict(zip(TENSOR_COLUMNS, row, strict=True)) for row in values]

    def highest_lr(self) -> float:
        """Return the highest learning rate of the groups; 0 without a group."""
        return max((lr for _, lr, _ in self.groups), default=0.0)
