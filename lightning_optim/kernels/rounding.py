"""Storing numbers in fewer bits without losing small changes: Kahan compensation, and stochastic rounding.

Everything here is plain arithmetic that each backend runs as it is (`rules.rebind`): on Python numbers, torch tensors,
and in compiled kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KEY_COLUMNS = ("rounding_key_high", "rounding_key_low")
"""Scalars of a tensor that is rounded stochastically: its key in two halves, which even a float32 holds exactly."""

PIECE = {"cpu": 2**16}
"""Elements that are rounded at once, by device: 64-bit random numbers take four times what they round."""

PIECE_ELSEWHERE = 2**24


def kahan_pending(rest: Any, change: Any) -> Any:
    """What is to be added to a parameter: minus the change, and what earlier steps could not store."""
    return rest - change


def kahan_rest(pending: Any, after: Any, param: Any) -> Any:
    """What of ``pending`` the step from ``param`` to ``after``, as stored, has left out.

    Kahan, Further remarks on reducing truncation errors, 1965, https://doi.org/10.1145/363707.363723. The difference of
    two neighbouring stored numbers is exact in float32. A compiler that may reassociate would make this 0.
    """
    return pending - (after - param)


def mix(x: Any) -> Any:
    """A bijection of 32-bit integers in which every output bit depends on every input bit.

    Two rounds of multiply and xor-shift, with the multipliers that C. Wellons found by search
    (https://nullprogram.com/blog/2018/07/31/). In 64-bit arithmetic, which may wrap, or in Python's.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def noise(index: Any, key: Any) -> Any:
    """32 random bits for element ``index`` (row-major) of an array with this ``key``: the same on every backend."""
    return mix((mix((index ^ key) & 0xFFFFFFFF) + key) & 0xFFFFFFFF)


def slot_key(key: Any, slot: Any) -> Any:
    """The key of one array of a tensor: 0 is the parameter, 2 the first state, 3 the second."""
    return mix((key + slot) & 0xFFFFFFFF)


def next_key(key: Any) -> Any:
    """The key of a tensor's next step: steps of the golden ratio visit all 2³² keys."""
    return (key + 0x9E3779B9) & 0xFFFFFFFF


def first_key(seed: int, position: int) -> int:
    """The key of the first step of the parameter at ``position`` in its optimizer."""
    return int(mix((mix(seed & 0xFFFFFFFF) + position) & 0xFFFFFFFF))


def key_columns(keys: Sequence[Tensor]) -> dict[str, Tensor]:
    """`KEY_COLUMNS` by name, each [tensors], of 0-d int64 keys."""
    stacked = torch.stack(list(keys))
    return dict(zip(KEY_COLUMNS, (stacked >> 16, stacked & 0xFFFF), strict=True))


def advance(keys: Sequence[Tensor], skip: Tensor | None) -> None:
    """Move keys on to the next step, unless this one is skipped."""
    old = torch.stack(list(keys))
    new = next_key(old)
    torch._foreach_copy_(list(keys), list((new if skip is None else torch.where(skip != 0, old, new)).unbind()))


def round_stochastically(values: Tensor, key: Tensor, slot: int) -> Tensor:
    """``values`` (float32) in bfloat16, each up or down with a probability proportional to its distance; unbiased.

    Sixteen random bits are added below the last bit that stays, and the rest is cut off: a value a fraction f of the
    way to its upper neighbour carries with probability f. Values that bfloat16 has stay as they are.

    Args:
        values: What to round. NaN and infinity stay.
        key: The tensor's key, 0-d int64.
        slot: See `slot_key`.
    """
    size = PIECE.get(values.device.type, PIECE_ELSEWHERE)
    flat = values.float().contiguous().view(-1)
    result = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    first = 0
    for piece, rounded in zip(torch.split(flat, size), torch.split(result.view(-1), size), strict=True):
        index = torch.arange(first, first + piece.numel(), device=values.device)
        bits = (noise(index, slot_key(key, slot)) & 0xFFFF).to(torch.int32)
        moved = ((piece.view(torch.int32) + bits) & -0x10000).view(torch.float32)
        rounded.copy_(torch.where(piece.isnan(), piece, moved))
        first += piece.numel()
    return result
