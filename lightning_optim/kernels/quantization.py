"""8-bit quantization of optimizer state: blocks of 256 values with one scale each, and codes that are densest near 0.

No block has values of two rows of a tensor (`scale_shape`), so that a tensor which is sharded by rows has the scales of
its rows on the same rank, and can be sharded over another number of ranks. The scales have the shape of the tensor with
blocks in place of its last dimensions.

Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, https://arxiv.org/abs/2110.02861, with two
differences. Values are rounded to one of the two nearest codes at random, in proportion: a second moment changes by a
thousandth per step, the codes lie a hundredth apart, and rounding to the nearest would let it rise (one large gradient
suffices) but not fall. Moreover, a positive second moment is never rounded to 0, because steps are divided by its root.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from lightning_optim.kernels.rounding import noise, slot_key

BLOCK = 256
"""Number of values that share a scale, which is the largest magnitude among them."""

SHORT = 64
"""Number of values below which a row is too short for a scale of its own."""


@cache
def code_map(signed: bool) -> Tensor:
    """Return the values of the 256 codes, ascending, float32, shape [256].

    The codes cover seven decades below 1, from 10⁻⁶ up. Each decade has twice as many codes as the one below, placed at
    the centres of equal parts of its upper nine tenths. With 0 and 1 (but no -1) there are 256 codes in both cases.

    Args:
        signed: Whether the codes are in [-1, 1]; otherwise in [0, 1], for second moments.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        middles = [0.1 + 0.9 * (part + 0.5) / parts for part in range(parts)]
        values += [10.0 ** (decade - 6) * middle for middle in middles]
    if signed:
        values += [-value for value in values if 0.0 < value < 1.0]
    return torch.tensor(sorted(values), dtype=torch.float64, device="cpu").float()


def blocks(numel: int) -> int:
    """Return the number of blocks, and so of scales, of ``numel`` values in one row."""
    return -(-numel // BLOCK)


def scale_shape(shape: torch.Size) -> torch.Size:
    """Return the shape of the scales of a tensor of ``shape``.

    As many of the last dimensions form a row as it takes to have `SHORT` values: the last one of a matrix, all but the
    first one of a convolution. A vector, and a matrix of shorter rows, is one row.

    Example:
        >>> [tuple(scale_shape(torch.Size(shape))) for shape in ((10, 512), (8, 10, 300), (64, 32, 3, 3), (5003,))]
        [(10, 2), (8, 10, 2), (64, 2), (20,)]
    """
    row = 1
    for dim in range(len(shape) - 1, 0, -1):
        row *= shape[dim]
        if row >= SHORT:
            return torch.Size((*shape[:dim], blocks(row)))
    return torch.Size((blocks(shape.numel()),))


def row_size(numel: int, shape: torch.Size) -> int:
    """Return the number of values in each row of a tensor of ``numel`` values whose scales have ``shape``."""
    rows = shape[:-1].numel()
    return numel // rows if rows else 0


def quantize(
    values: Tensor, signed: bool, key: Tensor, slot: int, shape: torch.Size | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize ``values`` with stochastic rounding.

    Args:
        values: Tensor of any shape. A NaN or an infinity makes its whole block NaN.
        signed: Argument of `code_map`.
        key: Key of the random numbers, int64, shape [].
        slot: Index of the array; see `rounding.slot_key`.
        shape: Shape of the scales, if not that of `scale_shape`: (blocks,) where all values are one row.

    Returns:
        Codes, uint8, in the shape of ``values``; and scales, float32, in their ``shape``.
    """
    shape = scale_shape(values.shape) if shape is None else shape
    codes = code_map(signed).to(values.device)
    flat = values.float().reshape(-1)
    rows, width = shape[:-1].numel(), row_size(flat.numel(), shape)
    padded = functional.pad(flat.view(rows, width), (0, -width % BLOCK)).view(*shape, BLOCK)
    scales = padded.abs().amax(-1) if padded.numel() else padded.new_zeros(shape)
    scales = scales + scales * 0  # A block with an infinity cannot be restored, so it becomes NaN.
    unit = torch.where(scales[..., None] > 0, padded / scales[..., None], 0.0)
    unit = unit.view(rows, shape[-1] * BLOCK)[:, :width].reshape(-1)
    lower = (torch.bucketize(unit, codes, right=True) - 1).clamp(0, 254)
    below = codes[lower]
    fraction = (unit - below) / (codes[lower + 1] - below)
    index = torch.arange(flat.numel(), device=values.device)
    random = (noise(index, slot_key(key, slot)) & 0xFFFF).float() * (1 / 65536)
    chosen = lower + (random < fraction)
    if not signed:
        chosen = torch.where(flat > 0, chosen.clamp(min=1), chosen)
    return chosen.to(torch.uint8).view(values.shape), scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Return the values of ``codes``, uint8, any shape, and ``scales``, float32: float32, in the shape of ``codes``."""
    width = row_size(codes.numel(), scales.shape)
    values = code_map(signed).to(codes.device)[codes.reshape(-1, max(width, 1)).int()]
    wide = scales.reshape(-1, scales.shape[-1]).repeat_interleave(BLOCK, dim=1)[:, :width]
    return (values * wide).view(codes.shape)


def filled(param: Tensor, value: float, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes, uint8, in the shape of ``param``, and scales, float32, of a state of one value, at least 0."""
    code = int((code_map(signed) == (1 if value else 0)).nonzero())
    codes = torch.full(param.shape, code, dtype=torch.uint8, device=param.device)
    return codes, torch.full(scale_shape(param.shape), value, dtype=torch.float32, device=param.device)
