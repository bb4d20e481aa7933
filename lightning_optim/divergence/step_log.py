"""A flight recorder: one row of numbers per step, from the device to the host without waiting."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LogRow:
    """One step as the host hears of it.

    Args:
        step: The number that the writer gave it.
        values: The numbers, shape [columns].
    """

    step: int
    values: np.ndarray


class StepLog:
    """StepLog in the order they were written, each as soon as it has been copied to the host.

    On the CPU a row can be read at once. On an accelerator a row is copied into pinned memory behind what the device is
    doing, and given out ``lag`` steps later, on every rank at the same step, so that what the host does about it is
    done by all ranks together. By then it has long arrived.

    Args:
        lag: After how many further rows a row is given out, on an accelerator.
    """

    def __init__(self, lag: int = 8) -> None:
        self._lag = lag
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        """How many have been written and not given out."""
        return len(self._pending)

    def write(self, step: int, values: Tensor) -> None:
        """Sends a row off.

        Args:
            step: Its number.
            values: Shape [columns]; not to be written to afterwards.
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
        """The rows whose time has come.

        Args:
            everything: Those still on their way, too; waits for them.
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
        """Forgets what has not been given out."""
        self._pending.clear()

    def state_dict(self) -> list[list[float]]:
        """What has not been given out yet, for a checkpoint: each row behind its number."""
        for _, _, arrived in self._pending:
            if arrived is not None:
                arrived.synchronize()
        return [[float(step), *values.cpu().numpy().tolist()] for step, values, _ in self._pending]

    def load_state_dict(self, state: list[list[float]]) -> None:
        """Takes up rows that another run had on their way."""
        self._pending = deque(
            (int(row[0]), torch.tensor(row[1:], dtype=torch.float64, device="cpu"), None) for row in state
        )
