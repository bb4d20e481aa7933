"""8-bit corrections of bf16 weights in CPU kernels: the arithmetic of `kernels.corrections`, one element at a time."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from lightning_optim.kernels.cpu.memory import WITHIN_KERNELS


def _correction(param: Any, code: Any) -> Any:
    """Return the amount that the correction ``code`` adds to a bf16 weight, float32."""
    bits: Any = np.float32(param).view(np.int32)
    return np.int32(bits + (np.int32(code) << np.int32(8))).view(np.float32) - param


def _cut(weight: Any, random: Any) -> Any:
    """Return the bf16 weight, as float32, and its correction; see `corrections.cut`."""
    bits: Any = np.float32(weight).view(np.int32)
    kept = np.int32(bits + np.int32(random & 0xFF)) >> np.int32(8)
    upper = np.int32(kept + np.int32(0x80)) >> np.int32(8)
    code = np.int64(kept) - np.int64(np.int32(upper << np.int32(8)))
    rounded = np.int32(upper << np.int32(16)).view(np.float32)
    is_nan = weight != weight
    return weight if is_nan else rounded, np.int64(0) if is_nan else code


SOURCES = (_correction, _cut)
"""Functions that enter the fingerprint of a kernel."""


def names() -> dict[str, Any]:
    """Return the globals that the text of a kernel refers to."""
    return {
        "correction": numba.njit(_correction, error_model="numpy", **WITHIN_KERNELS),
        "cut": numba.njit(_cut, error_model="numpy", **WITHIN_KERNELS),
    }
