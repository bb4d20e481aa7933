"""Launches on an accelerator, and the small tables that they read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optim.core.transfer import upload
from lightning_optim.kernels.triton.codegen import OPTIONS, THREADS


def launch(function: Any, programs: int, device: torch.device, *arguments: Any, threads: int = THREADS) -> None:
    """Launch ``programs`` instances of a jit function on the current device.

    No argument is specialised on, so the compiled kernel depends on dtypes and numbers only. It is kept and launched
    directly: to have Triton look it up takes longer than most launches.
    """
    key = (function, device, threads, *(a.dtype if isinstance(a, Tensor) else a for a in arguments))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*arguments)
        return
    compiled = function[(programs,)](*arguments, num_warps=threads // _threads_per_warp(device), **OPTIONS)
    if compiled is not None:  # The interpreter returns nothing.
        _compiled[key] = compiled


_compiled: dict[Any, Any] = {}


@lru_cache(maxsize=16)
def _threads_per_warp(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).warp_size) if device.type == "cuda" else 32


@lru_cache(maxsize=64)
def address_table(addresses: bytes, device: torch.device, stream: int) -> Tensor:
    """Upload addresses to the device; the cache avoids this while they do not change.

    Tables are cached per stream, because memory freed on one stream may be reused there while another still reads it.
    """
    return upload(np.frombuffer(addresses, dtype=np.int64), device)


def flag(skip: Tensor | None, device: torch.device) -> Tensor:
    """Return the flag that a kernel reads, float32, shape []; the step is skipped if it is non-zero."""
    if skip is None:
        return _zero(device, stream_of(device))
    return skip if skip.dtype == torch.float32 else (skip != 0).float()


@lru_cache(maxsize=16)
def _zero(device: torch.device, stream: int) -> Tensor:
    return torch.zeros((), device=device)


def stream_of(device: torch.device) -> int:
    """Return the current stream of a device, as a number."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current, because Triton launches on the current device and not on that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
