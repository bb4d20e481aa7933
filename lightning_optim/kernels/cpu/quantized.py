"""8-bit state in CPU kernels: the arithmetic of `quantization`, one element at a time.

A kernel processes tiles of one quantization block: it writes updated values to a buffer while it computes their largest
magnitude, and then encodes the buffer. No fast-math flags are used, so codes equal those of the reference backend bit
for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lightning_optim.kernels.cpu.memory import WITHIN_KERNELS
from lightning_optim.kernels.quantization import code_map

HALF_WORD = np.float32(1 / 65536)
ONE = 0x3F80  # This is the upper half of the float32 1.0.


def _encode(value: Any, scale: Any, random: Any, codes: Any, guesses: Any) -> Any:
    """Return the code of ``value`` in a block with ``scale``; see `quantization.quantize`."""
    unit: Any = value / scale if scale > 0 else np.float32(0)
    bits: Any = np.float32(unit).view(np.int32)
    place = min((bits >> 16) & 0x7FFF, ONE) + (ONE + 1 if bits < 0 else 0)
    lower: Any = np.int64(guesses[place])
    lower = min(lower + (1 if codes[lower + 1] <= unit else 0), 254)
    below = codes[lower]
    fraction = (unit - below) / (codes[lower + 1] - below)
    return lower + (1 if np.float32(random & 0xFFFF) * HALF_WORD < fraction else 0)


def _encode_positive(value: Any, scale: Any, random: Any, codes: Any, guesses: Any) -> Any:
    """Return the same code, but never that of 0 for a value above 0."""
    code = encode(value, scale, random, codes, guesses)
    return 1 if value > 0 and code == 0 else code


encode = numba.njit(_encode, error_model="numpy", **WITHIN_KERNELS)
encode_positive = numba.njit(_encode_positive, error_model="numpy", **WITHIN_KERNELS)

SOURCES = (_encode, _encode_positive)
"""Functions that enter the fingerprint of a kernel."""


@cache
def guesses(signed: bool) -> npt.NDArray[np.uint8]:
    """Return a table from the upper half of a float32 in [-1, 1] to the code below it, or to the one before that.

    Values that share an upper half differ by less than one per cent, and neighbouring codes by more, so one comparison
    corrects the guess. Non-negative values come first, then negative ones.
    """
    codes = code_map(signed).numpy()
    first = (np.arange(ONE + 1, dtype=np.uint32) << 16).view(np.float32)
    last = ((np.arange(ONE + 1, dtype=np.uint32) << 16) | 0xFFFF).view(np.float32)
    lowest = np.concatenate([first, -last])
    return (np.searchsorted(codes, lowest, side="right") - 1).clip(0, 254).astype(np.uint8)


def names() -> dict[str, Any]:
    """Return the globals that the text of a kernel refers to."""
    return {
        "np": np,
        "encode_True": encode,
        "encode_False": encode_positive,
        "codes_True": code_map(True).numpy(),
        "codes_False": code_map(False).numpy(),
        "guesses_True": guesses(True),
        "guesses_False": guesses(False),
    }
