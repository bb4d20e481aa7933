"""Measurements for clip rules in one read: norms of output units, and Σ g²/v̂.

Both have compiled kernels on the CPU. Elsewhere, and for layouts that kernels do not read, they are made of torch's
operations, piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_optim import kernels
from lightning_optim.core.host import read, widest_dtype
from lightning_optim.kernels import plain
from lightning_optim.kernels.pieces import norm, piece_size, pieces, take


def unit_squares(tensors: Sequence[Tensor], rows: Sequence[int], device: torch.device) -> Tensor:
    """Compute the square sum of each output unit.

    Args:
        tensors: Strided, real, local tensors of any shapes, dtypes and devices.
        rows: Number of units of each tensor: its first size, or 1 for a tensor that is one unit.
        device: Device of the result.

    Returns:
        Shape [units of all tensors], float64 where ``device`` supports it.
    """
    parts: dict[int, Tensor] = {}
    kinds: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if _compiled(tensor) and _in_rows(tensor, rows[i]):
            kinds.setdefault(tensor.dtype, []).append(i)
        else:
            parts[i] = _unit_squares(tensor, rows[i])
    for indices in kinds.values():
        from lightning_optim.kernels.cpu.measures import row_squares

        counts = [rows[i] for i in indices]
        squares = torch.from_numpy(row_squares([tensors[i] for i in indices], counts))
        if len(indices) == len(tensors):
            return squares.to(device, widest_dtype(device))
        parts.update(zip(indices, torch.split(squares, counts), strict=True))
    return torch.cat([parts[i].to(device, widest_dtype(device), non_blocking=True) for i in range(len(tensors))])


def _in_rows(tensor: Tensor, rows: int) -> bool:
    """Return whether each unit fills one range of memory, and the units follow each other in order."""
    if not plain.is_dense(tensor):
        return False
    return rows <= 1 or tensor.numel() == 0 or tensor.stride(0) * rows == tensor.numel()


def _unit_squares(tensor: Tensor, rows: int) -> Tensor:
    """Return the square sum of each unit in torch's operations, shape [rows]."""
    wide, size = widest_dtype(tensor.device), piece_size(tensor.device)
    if rows == 1:
        return norm(tensor, wide).square().reshape(1)
    if tensor.numel() > rows * size:
        return torch.stack([norm(unit, wide) for unit in tensor]).square()
    within = tuple(range(1, tensor.dim()))
    count = max(1, rows * size // max(tensor.numel(), 1))
    parts = [tensor] if count >= rows else torch.split(tensor, count)
    norms: Tensor = torch.cat([torch.linalg.vector_norm(part, dim=within, dtype=wide) for part in parts])
    return norms.square()


@dataclass(frozen=True)
class Moment:
    """What is known of the second moment of one tensor.

    Args:
        exp_avg_sq: The second moment before this step, real, in the shape of the gradient; None if there is none yet.
        step: Number of steps in it: a number, or a tensor, shape [], on a device whose memory the host must not read.
        beta2: Its decay.
        eps: ε of the optimizer.
    """

    exp_avg_sq: Tensor | None
    step: float | Tensor
    beta2: float
    eps: float

    @property
    def is_first(self) -> bool:
        """Whether the host knows that v̂ is g², so that each element with a gradient counts as 1."""
        return self.exp_avg_sq is None or (not isinstance(self.step, Tensor) and self.step == 0)

    @property
    def floor(self) -> float:
        """Smallest √v̂ to divide by: 0/0, where the gradient has always been 0, must count as 0."""
        return max(self.eps, 1e-15)


def over_second_moments(
    grads: Sequence[Tensor], scale: Tensor | None, moments: Sequence[Moment], device: torch.device
) -> Tensor:
    """Compute Σ g² and Σ g²/v̂ of each tensor, with v̂ after this step.

    Args:
        grads: Real, local gradients of any shapes, dtypes and devices.
        scale: The loss scale that they still contain, shape []; None for none.
        moments: The second moment of each.
        device: Device of the result.

    Returns:
        Shape [tensors, 2], float64 where ``device`` supports it.
    """
    rows: dict[int, Tensor] = {}
    kinds: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (grad, moment) in enumerate(zip(grads, moments, strict=True)):
        other = grad if moment.is_first or moment.exp_avg_sq is None else moment.exp_avg_sq
        if _readable(grad, other) and not isinstance(moment.step, Tensor):
            kinds.setdefault((grad.dtype, other.dtype), []).append(i)
        else:
            rows[i] = _over_second_moment(grad, scale, moment)
    for indices in kinds.values():
        from lightning_optim.kernels.cpu.measures import ratios

        inverse = 1.0 if scale is None else 1 / read(scale)
        some = [moments[i] for i in indices]
        others = [
            grads[i] if m.is_first or m.exp_avg_sq is None else m.exp_avg_sq for i, m in zip(indices, some, strict=True)
        ]
        numbers = np.array([_numbers(moment, inverse) for moment in some], dtype=np.float64)
        rows.update(zip(indices, ratios([grads[i] for i in indices], others, numbers), strict=True))
    wide = widest_dtype(device)
    return torch.stack([rows[i].to(device, wide, non_blocking=True) for i in range(len(grads))])


def _readable(grad: Tensor, moment: Tensor) -> bool:
    """Return whether the kernel may read both at the same offsets; its squares are those of float64."""
    alike = grad.shape == moment.shape and (
        grad.stride() == moment.stride() or (grad.is_contiguous() and moment.is_contiguous())
    )
    return grad.dtype != torch.float64 and alike and plain.is_dense(grad) and _compiled(grad) and _compiled(moment)


def _numbers(moment: Moment, inverse_scale: float) -> list[float]:
    """Return the kernel's scalars."""
    if moment.is_first:
        return [inverse_scale, 0.0, 0.0, 0.0, 1.0]
    assert not isinstance(moment.step, Tensor)
    beta2 = float(moment.beta2)  # A user of torch's optimizers may give a tensor.
    correction = 1 - beta2 ** (moment.step + 1)
    old, new = beta2 / correction, (1 - beta2) / correction
    return [inverse_scale, old, new, moment.floor**2, 0.0]


def _over_second_moment(grad: Tensor, scale: Tensor | None, moment: Moment) -> Tensor:
    """Return (Σ g², Σ g²/v̂) of one tensor in torch's operations, shape [2]."""
    wide = widest_dtype(grad.device)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    step, beta2 = moment.step, moment.beta2
    found = []
    for index in pieces(grad.shape, grad.device):
        size = take(grad, index).abs().to(dtype)
        size = size if scale is None else size / scale.to(size.device)
        norm_sq = torch.linalg.vector_norm(size, dtype=wide).square()
        counted = (size > 0).sum().to(wide)
        if moment.is_first or moment.exp_avg_sq is None:
            found.append(torch.stack([norm_sq, counted]))
            continue
        old = take(moment.exp_avg_sq, index).to(dtype)
        # Square roots are used throughout, because the square of a finite gradient may be infinite.
        root = torch.hypot(old.sqrt().mul_(beta2**0.5), size * (1 - beta2) ** 0.5)
        root.div_((1 - beta2 ** (step + 1)) ** 0.5)
        ratio = (size / root.clamp_(min=moment.floor)).square_().sum().to(wide)
        ratio = torch.where(step > 0, ratio, counted) if isinstance(step, Tensor) else ratio
        found.append(torch.stack([norm_sq, ratio]))
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def _compiled(tensor: Tensor) -> bool:
    """Return whether the compiled kernels of the CPU may read ``tensor``."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in plain.FLOATS
        and kernels.choose("auto", tensor.device).name == "cpu"
        and plain.is_plain(tensor)
        and plain.why_unsafe(tensor, written=False) is None
    )
