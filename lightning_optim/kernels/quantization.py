"""8-bit quantization of optimizer state: blocks of 256 values with one scale each, and codes that are densest near 0.

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
    """Return the number of blocks, and so of scales, of ``numel`` values."""
    return -(-numel // BLOCK)


def quantize(values: Tensor, signed: bool, key: Tensor, slot: int) -> tuple[Tensor, Tensor]:
    """Quantize ``values`` with stochastic rounding.

    Args:
        values: Tensor of any shape; blocks are consecutive in row-major order. A NaN or an infinity makes its whole
            block NaN.
        signed: Argument of `code_map`.
        key: Key of the random numbers, int64, shape [].
        slot: Index of the array; see `rounding.slot_key`.

    Returns:
        Codes, uint8, in the shape of ``values``; and scales, float32, [blocks].
    """
    codes = code_map(signed).to(values.device)
    flat = values.float().reshape(-1)
    padded = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(1) if len(padded) else padded.new_zeros(0)
    scales = scales + scales * 0  # A block with an infinity cannot be restored, so it becomes NaN.
    unit = torch.where(scales[:, None] > 0, padded / scales[:, None], 0.0).view(-1)[: flat.numel()]
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
    """Return the values of ``codes`` (uint8, any shape) and ``scales`` (float32, [blocks]): float32, shape of codes."""
    values = code_map(signed).to(codes.device)[codes.reshape(-1).int()]
    return (values * scales.repeat_interleave(BLOCK)[: values.numel()]).view(codes.shape)


def filled(param: Tensor, value: float, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes (uint8, shape of ``param``) and scales (float32, [blocks]) of a state of one value, at least 0."""
    code = int((code_map(signed) == (1 if value else 0)).nonzero())
    codes = torch.full(param.shape, code, dtype=torch.uint8, device=param.device)
    return codes, torch.full((blocks(param.numel()),), value, dtype=torch.float32, device=param.device)
