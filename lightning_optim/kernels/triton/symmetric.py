"""Symmetric products of 16-bit matrices: the tiles on and below the diagonal are computed, and written twice."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_optim.kernels.triton.functions import jit
from lightning_optim.kernels.triton.launch import current_device

TILE, STEP = 128, 64
OPTIONS = {"num_warps": 8, "num_stages": 3}
"""Three steps of two tiles are 96 KiB of shared memory, which all GPUs of compute capability 8.0 and later have."""


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x @ y, which must be symmetric.

    Args:
        x: Shape [rows, inner] or [matrices, rows, inner], bfloat16 or float16.
        y: Shape [inner, rows] or [matrices, inner, rows], of the same dtype.

    Returns:
        Shape [rows, rows] or [matrices, rows, rows], contiguous; sums are in float32.
    """
    return _product(x, y, None, 0.0, 1.0)


def add_product(add: Tensor, x: Tensor, y: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Return beta * add + alpha * (x @ y), all symmetric; see `product`. ``add`` has the shape of the result."""
    return _product(x, y, add, beta, alpha)


def _product(x: Tensor, y: Tensor, add: Tensor | None, beta: float, alpha: float) -> Tensor:
    *_, rows, inner = x.shape
    result = torch.empty(*x.shape[:-2], rows, rows, dtype=x.dtype, device=x.device)
    added = result if add is None else add.contiguous()
    xs, ys = (tensor if tensor.dim() == 3 else tensor[None] for tensor in (x, y))
    tiles = triton.cdiv(rows, TILE)
    grid = (tiles * (tiles + 1) // 2, len(xs))
    sizes = (rows, *xs.stride(), *ys.stride(), inner)
    with current_device(x.device):
        halved[grid](xs, ys, added, result, beta, alpha, *sizes, add is not None, TILE, STEP, **OPTIONS)
    return result


@jit
def halved(
    x: Any,
    y: Any,
    add: Any,
    result: Any,
    beta: Any,
    alpha: Any,
    rows: Any,
    x_matrix: Any,
    x_row: Any,
    x_inner: Any,
    y_matrix: Any,
    y_inner: Any,
    y_column: Any,
    inner: tl.constexpr,
    adds: tl.constexpr,
    tile: tl.constexpr,
    step: tl.constexpr,
) -> None:
    """Compute one tile on or below the diagonal of one matrix, and write it and its mirror image.

    `add` and `result` are contiguous, [matrices, rows, rows]; the numbers after `rows` are strides in elements.
    """
    number = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    # Tile `number` of the rows 0; 1, 2; 3, 4, 5; ...: the root is exact up to rounding, which the next lines undo.
    down = ((tl.sqrt(8.0 * number + 1.0) - 1.0) / 2.0).to(tl.int32)
    down = tl.where(down * (down + 1) // 2 > number, down - 1, down)
    down = tl.where((down + 1) * (down + 2) // 2 <= number, down + 1, down)
    across = number - down * (down + 1) // 2

    i = (down * tile + tl.arange(0, tile)).to(tl.int64)
    j = (across * tile + tl.arange(0, tile)).to(tl.int64)
    k = tl.arange(0, step).to(tl.int64)
    lefts = x + matrix * x_matrix + i[:, None] * x_row + k[None, :] * x_inner
    rights = y + matrix * y_matrix + k[:, None] * y_inner + j[None, :] * y_column
    total = tl.zeros([tile, tile], tl.float32)
    for first in range(0, inner, step):
        left = tl.load(lefts, mask=(i[:, None] < rows) & (k[None, :] < inner - first), other=0.0)
        right = tl.load(rights, mask=(k[:, None] < inner - first) & (j[None, :] < rows), other=0.0)
        total = tl.dot(left, right, total)
        lefts += step * x_inner
        rights += step * y_inner

    here = matrix * rows * rows + i[:, None] * rows + j[None, :]
    inside = (i[:, None] < rows) & (j[None, :] < rows)
    total = total * alpha
    if adds:
        total += beta * tl.load(add + here, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(result.dtype.element_ty)
    tl.store(result + here, rounded, mask=inside)
    if down != across:
        there = matrix * rows * rows + j[:, None] * rows + i[None, :]
        tl.store(result + there, tl.trans(rounded), mask=(j[:, None] < rows) & (i[None, :] < rows))
