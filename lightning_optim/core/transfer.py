"""Transfers of values between host and device that do not wait for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a new tensor on ``device``, copied behind what the device is doing.

    `torch.tensor(values, device=...)` copies from pageable memory instead, for which CUDA stops the host.

    Args:
        values: A number, nested lists of them, or a numpy array.
        device: Where to.
        dtype: As for `torch.tensor`.

    Raises:
        RuntimeError: A CUDA graph is being captured: it would copy again, at each replay, what is long gone.
    """
    host = torch.tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "A CUDA graph is being captured, which cannot take in numbers of the host (learning rates, addresses). "
                "Take the optimizer's step outside of the graph."
            )
        host = host.pin_memory()  # from torch's own pool, which keeps it until the copy is done
    return host.to(device, non_blocking=True)


class HostMirror:
    """A host-side view of a small device tensor that changes in place; late, but never waited for.

    On the CPU it reads the tensor's own memory, so it is always exact and costs nothing. On an accelerator each
    [`push`][lightning_optim.core.transfer.HostMirror.push] starts an asynchronous copy into pinned memory, and reading
    gives the last values that have arrived, which can be a step or a few behind.

    Args:
        tensor: The tensor to follow; must keep its storage.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu", pin_memory=True)
        if self._host is not tensor:
            self._host.copy_(tensor)
        self._view: np.ndarray = self._host.numpy()

    def push(self) -> None:
        """Start copying the present values."""
        if self._host is not self._tensor:
            self._host.copy_(self._tensor, non_blocking=True)

    def read(self) -> list[float]:
        """The last values that have arrived."""
        return [value.item() for value in self._view]


class PendingValues:
    """A packed device tensor on its way to the host.

    Args:
        packed: Values to fetch, shape [values]; must not be written to afterwards.
    """

    def __init__(self, packed: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            host = torch.empty_like(packed, device="cpu", pin_memory=True)
            host.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            host = packed.cpu()  # no copy on the CPU; other accelerators have no events to poll, so this one waits
        self._host = host

    def ready(self) -> bool:
        """Whether the values have arrived."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def read(self) -> np.ndarray:
        """The values, waiting for them if they are still on their way."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: np.ndarray = self._host.numpy()
        return values
