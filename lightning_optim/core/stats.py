"""Statistics of one optimizer step: packed device tensors and the meaning of their columns.

Square sums are stored rather than norms, because they are additive over tensors, groups and shards; norms are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

STEP_SUMS = (
    "param_sq",  # Σ p², before the step
    "update_sq",  # Σ (p_after − p_before)²
    "grad_exp_avg",  # Σ g·m, with the first moment m as it was before the step
    "momentum_sq",  # Σ m², before the step
    "grad_sq_over_exp_avg_sq",  # Σ g²/v̂, v̂ the bias-corrected second moment after the step
    "below_eps",  # number of elements with √v̂ < eps
    "zero_grad",  # number of elements with g == 0
    "decay_sq",  # Σ of the squared part of weight decay in the change
)
"""The columns of [`StepStats.sums`][lightning_optim.core.stats.StepStats], in order."""

TENSOR_COLUMNS = ("grad_sq", "clipped_sq", *STEP_SUMS)
"""The columns of [`StepRecord.per_tensor`][lightning_optim.core.stats.StepRecord.per_tensor], in order."""

DECAYS = (0.9, 0.99)
"""Decays of the averages of gradients and of their squares, where the optimizer has none of its own."""


class GradStats:
    """Statistics of the gradients of one step, with the loss scale removed.

    Tensors are in the order of the optimizer's groups, and within a group in the order of its parameters; parameters
    without a gradient are omitted. This class holds the given values. In a step the subclass
    `lightning_optim.step.gradients.ReadGradStats` computes each quantity on first access and caches it, so that a step
    reads no more than its rules and reports need.

    Args:
        norm_sq: Square sum of each gradient, shape [tensors], on the device of the gradients. The dtype is float64
            where the device supports it, because a gradient of 2e19 is finite, but its square in float32 is not. An
            entry is not finite exactly where a gradient has a NaN or an infinity.
        group_sizes: Number of tensors in each parameter group; sums to ``tensors``.
        group_names: Name of each parameter group.
        numel: Number of elements of each tensor, over all shards.
        places: Index of each tensor among all parameters of the optimizer, int64, shape [tensors]; None if all have a
            gradient.
        parameters: Number of parameters of the optimizer; None for as many as there are tensors.

    Attributes:
        clipped: Called with these statistics to get the square sum of each gradient after clipping, shape [tensors], or
            None if that would take another read; None itself without clipping.

    Example:
        >>> GradStats(torch.tensor([9.0, 16.0]), group_sizes=(1, 1)).total_norm()
        tensor(5.)
    """

    def __init__(
        self,
        norm_sq: Tensor | None,
        group_sizes: tuple[int, ...],
        *,
        group_names: tuple[str, ...] = (),
        numel: tuple[int, ...] | None = None,
        places: Tensor | None = None,
        parameters: int | None = None,
    ) -> None:
        self.group_sizes = group_sizes
        self.parameters = sum(group_sizes) if parameters is None else parameters
        self.clipped: Callable[[GradStats], Tensor | None] | None = None
        self.group_names = group_names
        self.places = places
        given = {"norm_sq": norm_sq, "numel": numel}
        self.__dict__.update({name: value for name, value in given.items() if value is not None})

    @cached_property
    def norm_sq(self) -> Tensor:
        """Square sum of each gradient, shape [tensors]."""
        raise self._unknown("norm_sq")

    @cached_property
    def numel(self) -> tuple[int, ...]:
        """Number of elements of each tensor, over all shards."""
        raise self._unknown("numel")

    @cached_property
    def names(self) -> tuple[str | None, ...]:
        """Name of each tensor; None where it is unknown."""
        raise self._unknown("names")

    @cached_property
    def largest(self) -> Tensor:
        """Largest absolute value in each gradient, shape [tensors]; not finite if the gradient is not finite."""
        raise self._unknown("largest")

    @cached_property
    def units(self) -> UnitNorms:
        """Norms of each output unit of gradients and weights."""
        raise self._unknown("units")

    @cached_property
    def momentum_norm_sq(self) -> Tensor:
        """Square sum of each first moment, scaled to an average of gradients, shape [tensors]; 0 before step 1."""
        raise self._unknown("momentum_norm_sq")

    @cached_property
    def grad_sq_over_exp_avg_sq(self) -> Tensor:
        """Σ g²/v̂ of each tensor with v̂ after this step, shape [tensors]."""
        raise self._unknown("grad_sq_over_exp_avg_sq")

    @cached_property
    def decays(self) -> tuple[tuple[float, float], ...]:
        """Decays of the averages of gradients and of their squares, in [0, 1), for each parameter group."""
        return (DECAYS,) * len(self.group_sizes)

    @cached_property
    def clipped_norm_sq(self) -> Tensor:
        """Square sum of each gradient as the optimizer gets it, shape [tensors]; before a clamp of single elements."""
        after = None if self.clipped is None else self.clipped(self)
        return self.norm_sq if after is None else after

    @property
    def norm_sq_is_read(self) -> bool:
        """Whether `norm_sq` is available without reading the gradients."""
        return "norm_sq" in self.__dict__

    def total_norm(self) -> Tensor:
        """Return the norm of all gradients as one vector, shape []."""
        return self._total_norm

    def group_norms(self) -> Tensor:
        """Return the norm of the gradients of each parameter group, shape [groups]."""
        return sum_groups(self.norm_sq, self.group_sizes).sqrt()

    def finite(self) -> Tensor:
        """Return whether all gradients are finite, bool, shape [], from quantities that are already available."""
        return self._finite

    @cached_property
    def _total_norm(self) -> Tensor:
        return self.norm_sq.sum().sqrt()

    @cached_property
    def _finite(self) -> Tensor:
        largest_only = "largest" in self.__dict__ and not self.norm_sq_is_read
        known = self.largest if largest_only else self.norm_sq
        return (known * 0 == 0).all()  # This needs half the operations of isfinite.

    def _unknown(self, what: str) -> LookupError:
        return LookupError(f"These statistics do not have {what}, because they were not computed from gradients.")


@dataclass(frozen=True)
class UnitNorms:
    """Norms of all output units (a row, a filter, or a whole vector) of gradients and weights, in order of the tensors.

    Args:
        grads: Norm of each unit's gradient, over all shards, shape [units].
        params: Norm of its weights, shape [units].
        shapes: For each tensor, the shape in which values of its units broadcast over it: [rows, 1, 1], or [].
        sum_shards: Function from square sums of local shards to those over all shards, both [tensors].
        local_sq: Square sum of this rank's shard of each unit's gradient, shape [units].
    """

    grads: Tensor
    params: Tensor
    shapes: tuple[tuple[int, ...], ...]
    local_sq: Tensor
    sum_shards: Callable[[Tensor], Tensor]

    @property
    def counts(self) -> list[int]:
        """Number of units of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    def shaped(self, values: Tensor) -> list[Tensor]:
        """Numbers of units, [units], as one tensor for each gradient."""
        return [part.view(shape) for part, shape in zip(torch.split(values, self.counts), self.shapes, strict=True)]

    def norm_sq(self, divisors: Tensor | None = None) -> Tensor:
        """Return the square sum of each gradient, shape [tensors], with units divided by ``divisors``, [units]."""
        parts = self.local_sq if divisors is None else self.local_sq / divisors.square()
        return self.sum_shards(sum_groups(parts, self.counts))


@dataclass(frozen=True)
class StepStats:
    """Statistics of one update, collected on logging steps only.

    Args:
        sums: One row per tensor and one column per name in `STEP_SUMS`, shape [tensors, columns], float32. A column is
            NaN where the rule does not define the quantity (such as a first moment in plain SGD).
        group_sizes: Number of tensors in each parameter group.
        numel: Number of elements of each tensor, in the order of the rows.
    """

    sums: Tensor
    group_sizes: tuple[int, ...]
    numel: tuple[int, ...]

    def groups(self, name: str) -> Tensor:
        """Return the sum called ``name`` over each parameter group, shape [groups]."""
        return self._by_group[:, STEP_SUMS.index(name)]

    def means(self, name: str) -> Tensor:
        """Return the sum called ``name`` divided by the number of elements of each parameter group, shape [groups]."""
        return self._means_by_group[:, STEP_SUMS.index(name)]

    @cached_property
    def _by_group(self) -> Tensor:
        """All sums over groups, shape [groups, columns]; computed at once, because most are used."""
        return sum_groups(self.sums, self.group_sizes)

    @cached_property
    def _means_by_group(self) -> Tensor:
        ends = list(accumulate(self.group_sizes))
        numel = [sum(self.numel[end - size : end]) for end, size in zip(ends, self.group_sizes, strict=True)]
        return torch.stack([sums / (n or math.nan) for sums, n in zip(self._by_group.unbind(), numel, strict=True)])


@dataclass(frozen=True)
class StepCounts:
    """Counts of steps so far, as known on the host.

    Args:
        steps: Optimizer steps, skipped ones included.
        clipped: Steps whose gradients were scaled down.
        skipped: Steps without an update.
    """

    steps: int = 0
    clipped: int = 0
    skipped: int = 0

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts(self.steps + other.steps, self.clipped + other.clipped, self.skipped + other.skipped)


@dataclass(frozen=True)
class StepRecord:
    """All data recorded about one step, with tensors on the device.

    Args:
        group_names: Name of each parameter group that has gradients.
        hyperparameters: ``lr``, ``weight_decay`` and so on of these groups, as used in this step.
        grad: Statistics of the gradients before clipping, with the loss scale removed.
        clipped_norm_sq: Square sum of each gradient after clipping, shape [tensors].
        skip: 1.0 if the step was skipped, else 0.0, shape [].
        update: Statistics of the update.
        steps: Number of optimizer steps so far, this one included.
        counts: Numbers of clipped and of skipped steps so far, int64, shape [2].
        param_names: Name of each tensor of ``grad``, or None where it is unknown.
        norms: Count, mean and maximum of the gradient norm over the steps since the last record whose gradients were
            read and finite, shape [3].
        histograms: How large elements are, by kind, shape [groups, columns], where asked for; see
            `lightning_optim.step.histograms`.
    """

    group_names: tuple[str, ...]
    hyperparameters: tuple[dict[str, Any], ...]
    grad: GradStats
    clipped_norm_sq: Tensor
    skip: Tensor
    update: StepStats
    steps: int
    counts: Tensor
    param_names: tuple[str | None, ...] = ()
    norms: Tensor | None = None
    histograms: Mapping[str, Tensor] = field(default_factory=dict)

    def per_tensor(self) -> Tensor:
        """Return the statistics of each tensor, on the device, shape [tensors, columns of `TENSOR_COLUMNS`]."""
        sums = self.update.sums
        norms = torch.stack([self.grad.norm_sq, self.clipped_norm_sq], dim=1)
        dtype = torch.promote_types(norms.dtype, sums.dtype)
        return torch.cat([norms.to(sums.device, dtype, non_blocking=True), sums.to(dtype)], dim=1)


def sum_groups(values: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """Sum consecutive slices of ``values``, one slice per group.

    The sums are taken in a fixed order; a scatter would use atomics on CUDA and not be deterministic.

    Args:
        values: Values of all tensors, shape [tensors, ...].
        group_sizes: Number of tensors in each group.

    Returns:
        Shape [groups, ...].
    """
    return torch.stack([part.sum(dim=0) for part in torch.split(values, list(group_sizes))])
