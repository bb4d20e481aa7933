"""Exchange of the contents of two tensors in place, without a third one that would have to be kept and saved."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFF
_HALF = 0x8000


def is_exact(dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Return whether `exchange` can be undone bit for bit: the dtypes are equal, or bfloat16 and float32."""
    return dtype == wide or (dtype, wide) == (torch.bfloat16, torch.float32)


def exchange(narrow: Tensor, wide: Tensor) -> None:
    """Exchange the contents of two tensors, such that `undo` restores both bit for bit.

    A bfloat16 tensor receives the other one rounded to nearest, ties away from zero. The float32 tensor then holds bits
    and not numbers: the 16 that rounding has cut off, and the 16 of the former bfloat16 value.

    Args:
        narrow: Written in place.
        wide: Written in place; in the shape of ``narrow``, of the same dtype, or float32 if ``narrow`` is bfloat16.

    Example:
        >>> weight, average = torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([1 / 3])
        >>> exchange(weight, average)
        >>> weight
        tensor([0.3340], dtype=torch.bfloat16)
        >>> undo(weight, average)
        >>> weight, average
        (tensor([1.5000], dtype=torch.bfloat16), tensor([0.3333]))
    """
    if narrow.dtype == wide.dtype:
        former = narrow.clone()
        narrow.copy_(wide)
        wide.copy_(former)
        return
    bits, short = wide.view(torch.int32), narrow.view(torch.int16)
    packed = (bits << 16) | (short.to(torch.int32) & _LOW)
    short.copy_((bits + _HALF) >> 16)
    bits.copy_(packed)


def undo(narrow: Tensor, wide: Tensor) -> None:
    """Undo `exchange` of the same tensors, which may have been saved and loaded in the meantime."""
    if narrow.dtype == wide.dtype:
        exchange(narrow, wide)
        return
    packed, short = wide.view(torch.int32), narrow.view(torch.int16)
    low = (packed >> 16) & _LOW
    # Where the half that was cut off begins with a one, rounding has added one to the other half.
    bits = ((short.to(torch.int32) << 16) | low) - ((low & _HALF) << 1)
    short.copy_((packed << 16) >> 16)
    packed.copy_(bits)
