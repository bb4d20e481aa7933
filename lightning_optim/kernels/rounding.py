"""Low-precision storage that preserves small changes: Kahan compensation and stochastic rounding.

The functions are plain arithmetic that each backend rebinds (`rules.rebind`): they run on Python numbers, on torch
tensors and in compiled kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KEY_COLUMNS = ("rounding_key_high", "rounding_key_low")
"""Names of the two scalars that hold the key of a stochastically rounded tensor, as halves exact in float32."""

PIECE = {"cpu": 2**16}
"""Number of elements rounded at once, by device: the 64-bit random numbers take four times the memory of a bf16."""

PIECE_ELSEWHERE = 2**24


def kahan_pending(rest: Any, change: Any) -> Any:
    """Return the amount to add to a parameter: the negated change plus the rounding error of earlier steps."""
    return rest - change


def kahan_rest(pending: Any, after: Any, param: Any) -> Any:
    """Return the part of ``pending`` that the stored step from ``param`` to ``after`` has lost to rounding.

    The difference of two neighbouring stored numbers is exact in float32. A compiler that may reassociate would turn
    the result into 0.

    References:
        Kahan, Further remarks on reducing truncation errors, 1965, https://doi.org/10.1145/363707.363723
    """
    return pending - (after - param)


def mix(x: Any) -> Any:
    """Hash a 32-bit integer by a bijection in which every output bit depends on every input bit.

    It takes two rounds of multiply and xor-shift, with the multipliers that C. Wellons found by search
    (https://nullprogram.com/blog/2018/07/31/). It is correct in 64-bit arithmetic, which may wrap, and in Python's.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def noise(index: Any, key: Any) -> Any:
    """Return 32 random bits for element ``index`` (row-major) of the array with ``key``, equal on all backends."""
    return mix((mix((index ^ key) & 0xFFFFFFFF) + key) & 0xFFFFFFFF)


def slot_key(key: Any, slot: Any) -> Any:
    """Return the key of one array of a tensor: slot 0 is the parameter, 2 the first state, 3 the second."""
    return mix((key + slot) & 0xFFFFFFFF)


def next_key(key: Any) -> Any:
    """Return the key of a tensor's next step; steps of the golden ratio visit all 2³² keys."""
    return (key + 0x9E3779B9) & 0xFFFFFFFF


def first_key(seed: int, position: int) -> int:
    """Return the key of the first step of the parameter at index ``position`` of its optimizer."""
    return int(mix((mix(seed & 0xFFFFFFFF) + position) & 0xFFFFFFFF))


def key_columns(keys: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the columns `KEY_COLUMNS`, int64, [tensors] each, of 0-d int64 keys."""
    stacked = torch.stack(list(keys))
    return dict(zip(KEY_COLUMNS, (stacked >> 16, stacked & 0xFFFF), strict=True))


def advance(keys: Sequence[Tensor], skip: Tensor | None) -> None:
    """Advance 0-d int64 keys in place to the next step, unless ``skip``, shape [], is non-zero."""
    old = torch.stack(list(keys))
    new = next_key(old)
    torch._foreach_copy_(list(keys), list((new if skip is None else torch.where(skip != 0, old, new)).unbind()))


def round_stochastically(values: Tensor, key: Tensor, slot: int, first: int = 0) -> Tensor:
    """Round to bfloat16, up or down with a probability proportional to proximity, which is unbiased.

    Sixteen random bits are added below the last bit that is kept, and the rest is truncated: a value at a fraction f of
    the way to its upper neighbour is rounded up with probability f. Values that bfloat16 represents do not change.

    Args:
        values: Tensor of any shape, rounded from float32. NaN and infinity do not change.
        key: Key of the tensor, int64, shape [].
        slot: Index of the array; see `slot_key`.
        first: Index of the first value in the array, if these are a piece of it.

    Returns:
        The rounded values, bfloat16, in the shape of ``values``.
    """
    size = PIECE.get(values.device.type, PIECE_ELSEWHERE)
    flat = values.float().contiguous().view(-1)
    result = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    for piece, rounded in zip(torch.split(flat, size), torch.split(result.view(-1), size), strict=True):
        index = torch.arange(first, first + piece.numel(), device=values.device)
        bits = (noise(index, slot_key(key, slot)) & 0xFFFF).to(torch.int32)
        moved = ((piece.view(torch.int32) + bits) & -0x10000).view(torch.float32)
        rounded.copy_(torch.where(piece.isnan(), piece, moved))
        first += piece.numel()
    return result
