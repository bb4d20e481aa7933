"""A log of steps: one row of numbers per step, transferred from the device to the host without waiting."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LogRow:
    """One row of the log, on the host.

    Args:
        step: The number of the step, as given to `StepLog.write`.
        values: The numbers, shape [columns].
    """

    step: int
    values: np.ndarray


class StepLog:
    """Rows in the order in which they were written, each once it has been copied to the host.

    On the CPU a row can be read at once. On an accelerator a row is copied asynchronously into pinned memory, and can
    be read ``lag`` steps later, on every rank at the same step, so that all ranks respond together. By then the copy
    has normally finished.

    Args:
        lag: Number of further rows after which a row can be read, on an accelerator.
    """

    def __init__(self, lag: int = 8) -> None:
        self._lag = lag
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        """Number of rows that have been written and not read."""
        return len(self._pending)

    def write(self, step: int, values: Tensor) -> None:
        """Start the transfer of a row.

        Args:
            step: The number of the step.
            values: The numbers, shape [columns]; the caller must not write to the tensor afterwards.
        """
        arrived = None
        if values.device.type == "cuda":
            host = torch.empty_like(values, device="cpu", pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            values = host
        self._pending.append((step, values, arrived))

    def read(self, everything: bool = False) -> list[LogRow]:
        """Return the rows that can be read, in order, and remove them from the log.

        Args:
            everything: Whether to wait for the rows that have not arrived, and return them as well.
        """
        rows = []
        while self._pending:
            _, _, arrived = self._pending[0]
            if arrived is not None and not everything and len(self._pending) <= self._lag:
                break
            step, values, _ = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            rows.append(LogRow(step, values.cpu().numpy()))
        return rows

    def discard(self) -> None:
        """Discard all rows that have not been read."""
        self._pending.clear()

    def state_dict(self) -> list[list[float]]:
        """Return the rows that have not been read, for a checkpoint: each as its number and its values."""
        for _, _, arrived in self._pending:
            if arrived is not None:
                arrived.synchronize()
        return [[float(step), *values.cpu().numpy().tolist()] for step, values, _ in self._pending]

    def load_state_dict(self, state: list[list[float]]) -> None:
        """Restore the rows returned by `state_dict`."""
        self._pending = deque(
            (int(row[0]), torch.tensor(row[1:], dtype=torch.float64, device="cpu"), None) for row in state
        )
