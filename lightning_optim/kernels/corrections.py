"""bf16 weights with an 8-bit correction: a float of 24 bits, cut in two.

A bf16 weight is the upper half of a float32, rounded; the correction holds the next 8 bits, as the signed difference
to what was rounded. Together they are a float32 without its last 8 bits, 2⁻¹⁶ of the weight. Changes that are smaller
are rounded up or down at random. Training with such weights: Gonzalez Ortiz et al., FlashOptim, 2026,
https://arxiv.org/abs/2602.23349, which rounds to the nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.kernels.rounding import noise, slot_key


def weights_of(param: Tensor, compensation: Tensor) -> Tensor:
    """Return the weights that parameters and their compensation stand for.

    Args:
        param: bfloat16 or float16, any shape.
        compensation: Its `kahan_comp`: 8-bit corrections of bfloat16, int8, or amounts to add in the dtype of the
            parameter, in its shape.

    Returns:
        float32, in the shape of ``param``.
    """
    if compensation.dtype != torch.int8:
        return param.float() + compensation.float()
    return (param.float().view(torch.int32) + (compensation.int() << 8)).view(torch.float32)


def cut(weights: Tensor, key: Tensor, slot: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Cut weights into bf16 and corrections; what is smaller is rounded up or down at random, in proportion.

    Args:
        weights: float32, any shape. NaN and infinity do not change.
        key: Key of the random numbers, int64, shape [].
        slot: Index of the array of corrections; see `rounding.slot_key`.
        first: Index of the first weight in the tensor, if these are a piece of it.

    Returns:
        The weights rounded to the nearest, bfloat16, and their corrections, int8, in the shape of ``weights``.
    """
    index = torch.arange(first, first + weights.numel(), device=weights.device).view(weights.shape)
    random = (noise(index, slot_key(key, slot)) & 0xFF).to(torch.int32)
    kept = (weights.contiguous().view(torch.int32) + random) >> 8
    upper = (kept + 0x80) >> 8
    nan = weights.isnan()
    rounded = torch.where(nan, weights, (upper << 16).view(torch.float32))
    return rounded.to(torch.bfloat16), (kept - (upper << 8)).masked_fill(nan, 0).to(torch.int8)
