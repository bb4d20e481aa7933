"""Transfers between host and device without synchronisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy values from the host to a new tensor on ``device``, asynchronously.

    `torch.tensor(values, device=...)` would copy from pageable memory, for which CUDA blocks the host.

    Args:
        values: A number, nested lists of numbers, or a numpy array.
        device: Target device.
        dtype: As for `torch.tensor`.

    Returns:
        A tensor in the shape of ``values``.

    Raises:
        RuntimeError: A CUDA graph is being captured, whose replays would copy from memory that is no longer valid.
    """
    host = torch.tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "A CUDA graph is being captured, which cannot contain values from the host (learning rates, "
                "addresses). Call the optimizer's step outside of the graph."
            )
        host = host.pin_memory()  # torch's allocator keeps pinned memory until the copy is done.
    return host.to(device, non_blocking=True)


class HostMirror:
    """Delayed host copy of the last of a series of small device tensors, without synchronisation.

    On the CPU it reads the memory of the tensor, so it is exact and free. On an accelerator each
    [`push`][lightning_optim.core.transfer.HostMirror.push] starts an asynchronous copy into pinned memory, and `read`
    returns the last values that have arrived, which may be a few steps old.

    Args:
        tensor: The first tensor, shape [values].
    """

    def __init__(self, tensor: Tensor) -> None:
        self._is_there = tensor.device.type == "cpu"
        self._host = tensor if self._is_there else torch.empty_like(tensor, device="cpu", pin_memory=True)
        if not self._is_there:
            self._host.copy_(tensor)

    def push(self, tensor: Tensor) -> None:
        """Follow ``tensor``, of the shape, dtype and device of the first one: start an asynchronous copy of it."""
        if self._is_there:
            self._host = tensor
        else:
            self._host.copy_(tensor, non_blocking=True)

    def read(self) -> list[float]:
        """Return the last values that have arrived."""
        values: list[float] = self._host.numpy().tolist()
        return values


class PendingValues:
    """An asynchronous copy of a packed device tensor to the host.

    Args:
        packed: Values to copy, shape [values]; they must not change afterwards.
    """

    def __init__(self, packed: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            host = torch.empty_like(packed, device="cpu", pin_memory=True)
            host.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            host = packed.cpu()  # No copy on the CPU; accelerators without events synchronise here.
        self._host = host

    def ready(self) -> bool:
        """Return whether the values have arrived."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def read(self) -> np.ndarray:
        """Return the values, shape [values], and wait for them if they have not arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: np.ndarray = self._host.numpy()
        return values
