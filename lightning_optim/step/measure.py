"""Measurements of tensors in one read: square sums, largest values, norms of units, and the effect of an update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim import kernels
from lightning_optim.core.sharding import local, max_over_shards, sum_over_shards, sum_split_units
from lightning_optim.core.stats import STEP_SUMS, UnitNorms
from lightning_optim.kernels.measures import unit_squares
from lightning_optim.kernels.plain import as_real

measure_norm_sq = torch.no_grad()(kernels.measure)
"""`kernels.measure` without autograd: the tensors may be states and parameters, not only gradients."""


@torch.no_grad()
def measure_largest(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the largest absolute value in each tensor in one read.

    Args:
        tensors: At least one, as for `measure_norm_sq`, but not sparse. For a complex tensor the largest value is that
            of real and imaginary parts.

    Returns:
        Shape [tensors], float64 if a tensor has double precision, else float32, on the device of the first tensor; NaN
        for a tensor that contains a NaN.

    Raises:
        RuntimeError: A tensor is sparse.
    """
    wide = (torch.float64, torch.complex128)
    dtype = torch.float64 if any(t.dtype in wide for t in tensors) else torch.float32
    device = tensors[0].device
    if any(tensor.layout != torch.strided for tensor in tensors):
        raise RuntimeError("Clipping by value needs dense gradients: create the layer with sparse=False.")
    parts = [as_real(local(tensor.detach())) for tensor in tensors]
    values = [_largest(part).to(device, dtype, non_blocking=True) for part in parts]
    largest = torch.stack(values)
    return max_over_shards(largest, tensors)


def _largest(part: Tensor) -> Tensor:
    """Return the largest absolute value, shape []; 0 for an empty tensor, for which torch raises an error.

    A norm of order infinity is the same, but took 60 times as long on the CPU (torch 2.13).
    """
    if part.numel() == 0:
        return part.new_zeros(())
    least, most = torch.aminmax(part)
    return torch.maximum(-least, most)


@torch.no_grad()
def measure_units(grads: Sequence[Tensor], params: Sequence[Tensor], scale: Tensor | None = None) -> UnitNorms:
    """Compute the norms of each output unit's gradient and weights, in one read of each.

    Args:
        grads: At least one gradient, dense.
        params: The parameter of each gradient.
        scale: Divisor of the gradients, shape []; None for 1.

    Returns:
        The norms of all units, float64 where the device has it, on the device of the first gradient.

    Raises:
        RuntimeError: A gradient is sparse.
    """
    device = grads[0].device
    shapes = tuple((local(p).shape[0], *[1] * (p.dim() - 1)) if p.dim() > 1 else () for p in params)
    if any(tensor.layout != torch.strided for tensor in grads):
        raise RuntimeError("Clipping unit by unit needs dense gradients: create the layer with sparse=False.")
    parts = [as_real(local(tensor.detach())) for tensor in (*grads, *params)]
    rows = [shape[0] if shape else 1 for shape in shapes] * 2
    squares = unit_squares(parts, rows, device).view(2, -1)
    if scale is not None:
        squares[0] /= scale.to(device).square()
    both = sum_split_units(squares, params, shapes).sqrt()
    return UnitNorms(both[0], both[1], shapes, squares[0], lambda sums: sum_over_shards(sums, params))


@torch.no_grad()
def measure_update(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Compute the sums of an update of which only the effect is known; overwrites ``before``.

    It is for optimizers that do not collect them in their own pass: |p|² and |Δp|² are exact, the other columns NaN.

    Args:
        before: Copies of this rank's parts of the parameters, made before the update.
        after: The parameters after the update.

    Returns:
        The `STEP_SUMS`, shape [tensors, columns], float64 where the device has it.
    """
    param_sq = sum_over_shards(measure_norm_sq(before), after)
    torch._foreach_sub_(list(before), [local(tensor.detach()) for tensor in after])
    sums = torch.full((len(before), len(STEP_SUMS)), torch.nan, dtype=param_sq.dtype, device=param_sq.device)
    sums[:, STEP_SUMS.index("param_sq")] = param_sq
    sums[:, STEP_SUMS.index("update_sq")] = sum_over_shards(measure_norm_sq(before), after)
    return sums
